
J
4
ed0e56ab8b2a0ecb 57f5170642dbefb66593f1a992ab1f51
fe9062d0fff82a66B
	
€ ((a77e7c793abc0d0c923a9afb275058e2fe57a198