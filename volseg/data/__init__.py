"""Cases and what becomes of them: layouts, checks, splits, prepared arrays, patches.

`cases`, `layouts`, `check`, `splits`, `content` and `reading` need numpy only; `resampling`,
`preprocessing`, `cache`, `spatial`, `intensity`, `augmentation` and `patches` need torch. Import
the module.
"""
