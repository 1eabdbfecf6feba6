"""How fast inversion is, and which calibration set is worth what: a bench for sceptics.

It uses dfq as its users do, keeps every measurement with the machine it was made on, and
renders its tables from what it kept alone.
"""
