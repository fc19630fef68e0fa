"""Weight files, which anyone may have written: `weights` reads and writes all kinds."""
