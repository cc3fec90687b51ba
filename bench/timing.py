"""The units of the columns that the measurements of a device share."""

UNITS = {
    **dict.fromkeys(("time", "least", "greatest", "floor"), "s"),
    "bytes": "bytes",
    "copy_rate": "bytes/s",
    "matrix_rate": "FLOP/s",
    "flops": "FLOP",
    "calls": "",
    "share": "",
}
