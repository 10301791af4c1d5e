"""The only room that imports all others: config → objects → runs."""
