
J
4
ed0e56ab8b2a0ecb 90a8a950fb0182e8d3bcad49d14f539f
fe9062d0fff82a66@
	
 (0(a77e7c793abc0d0c923a9afb275058e2fe57a198