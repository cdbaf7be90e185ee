"""What gradients through a quantised program optimise, so that quantisation changes a model's predictions least: the
rotations that weights absorb (SpinQuant, Liu et al. 2024, arXiv 2405.16406), and the scales of weights that are rounded
(PEQA, Kim et al. 2023, arXiv 2305.14152; EfficientQAT, Chen et al. 2024, arXiv 2407.11062).

``learn``             the public function ``learn_rotations``: the loop over steps
``tune``              the public function ``tune_scales``: likewise
``options``           of both
``training``          what both share: logits as a function, batches, and gradients
``network``           a program as a differentiable function of its rotations, or of its constants
``scaled``            a quantised model as a function of the scales of its weights
``segments``          where that program is cut, so that values are computed again rather than kept
``straight_through``  quantisation with a gradient
``precision``         that products have meanwhile
``losses``            how far predictions are off
``cayley``            Adam on orthogonal matrices
``rotations``         learned ones: which matrix is for which weights, and where the backend looks it up
``storage``           these in a folder
``tuned``             what tuning found, as a report
"""
