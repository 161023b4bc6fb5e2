"""Cases and what becomes of them: layouts, checks, splits, prepared arrays, patches.

`cases`, `layouts`, `check`, `splits`, `content` and `reading` need numpy only; `resampling`,
`preprocessing`, `cache`, `augmentation` and `patches` need torch and MONAI. Import the module.
"""
