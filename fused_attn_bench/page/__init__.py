"""What a page is made of, from a history to the data that its script draws."""
