"""NLVR: people's statements about synthetic pictures of three boxes (Suhr, Lewis, Yeh & Artzi, ACL 2017)."""
