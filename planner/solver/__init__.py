"""From a load table to where experts live and which replicas there are."""
