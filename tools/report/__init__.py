"""`kvstore report`: one page with all that the other commands show."""
