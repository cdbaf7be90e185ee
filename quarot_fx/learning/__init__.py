"""Learned rotations: the matrices that weights absorb are optimised so that quantisation changes a model's predictions
least (SpinQuant, Liu et al. 2024, arXiv 2405.16406).

``learn``             the public function ``learn_rotations``: the loop over steps
``options``           of learning
``network``           a rotated program as a differentiable function of its rotations
``segments``          where that program is cut, so that values are computed again rather than kept
``straight_through``  quantisation with a gradient
``losses``            how far predictions are off
``cayley``            Adam on orthogonal matrices
``rotations``         the result: which matrix is for which weights, and where the backend looks it up
``storage``           the result in a folder
"""
