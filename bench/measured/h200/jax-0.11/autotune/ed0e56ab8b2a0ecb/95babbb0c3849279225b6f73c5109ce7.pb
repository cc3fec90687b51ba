
J
4
ed0e56ab8b2a0ecb 95babbb0c3849279225b6f73c5109ce7
fe9062d0fff82a66>
	
@ ((a77e7c793abc0d0c923a9afb275058e2fe57a198