"""The exhaustive search of MESS: every configuration settled one by one or by a bound, with a certificate."""
