"""Host routes by BGP: the node's own FRR says where guests are."""
