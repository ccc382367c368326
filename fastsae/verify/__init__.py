"""Known-answer checks of every kernel on the device at hand: `fastsae verify`.

answers   the calls and what is right      checks   running them in this process
worker    a process that runs checks       run      which checks there are, isolation, the record
"""
