
J
4
ed0e56ab8b2a0ecb 1bcd86e138475db7b39f29bb6029f02d
fe9062d0fff82a66>
	
@ ((a77e7c793abc0d0c923a9afb275058e2fe57a198