"""Basis analysis: in which orthogonal basis every axis of every tensor can be, and which choice is the cheapest.

``factors``     what an axis is made of (hidden = heads x head_dim), by unification over the whole graph
``operator``    what a rule sees of an operator: its uses, its results, and what it may say about their axes
``rules``       the one table of operators
``analysis``    walks a graph and applies the table
``candidates``  what wants rotating
``cut``         the minimum cut that turns rules and wants into bases
``joining``     factors that are always rotated together get one rotation
``solution``    the cheapest bases, and which rotation leads into each
``outcome``     what became of a graph's axes
``plan``        that as data
"""
