"""Who belongs to the cluster, and who may do what: certificates, membership, users."""
