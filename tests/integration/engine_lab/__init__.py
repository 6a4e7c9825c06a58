"""Two engine processes and two stand-ins for guests: real memory, real page tables, no QEMU."""
