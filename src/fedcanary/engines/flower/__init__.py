"""The same rounds with every client behind a Flower node. Needs the extra `flower`, loaded only when asked for."""
