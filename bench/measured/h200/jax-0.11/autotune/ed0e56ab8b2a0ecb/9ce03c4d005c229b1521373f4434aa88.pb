
J
4
ed0e56ab8b2a0ecb 9ce03c4d005c229b1521373f4434aa88
fe9062d0fff82a66=
	
 ((a77e7c793abc0d0c923a9afb275058e2fe57a198