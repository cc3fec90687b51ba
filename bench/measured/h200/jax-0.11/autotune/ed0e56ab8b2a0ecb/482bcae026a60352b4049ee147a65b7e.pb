
J
4
ed0e56ab8b2a0ecb 482bcae026a60352b4049ee147a65b7e
fe9062d0fff82a66?
	
 (0(a77e7c793abc0d0c923a9afb275058e2fe57a198