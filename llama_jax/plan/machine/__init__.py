"""The machine that a plan is for: is it what was planned, and how fast is it really?"""
