"""How fast expert layers and MoE models run, ours and others': shapes, routings, floors, peers and tables."""
