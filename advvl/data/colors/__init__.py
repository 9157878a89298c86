"""Colors in Context: people's words for one of three colours (Monroe, Hawkins, Goodman & Potts, TACL 2017)."""
