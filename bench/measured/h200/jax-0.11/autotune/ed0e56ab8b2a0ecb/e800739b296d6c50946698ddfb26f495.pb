
J
4
ed0e56ab8b2a0ecb e800739b296d6c50946698ddfb26f495
fe9062d0fff82a66@
	
  (0(a77e7c793abc0d0c923a9afb275058e2fe57a198