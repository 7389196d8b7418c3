"""The bundled world: a grammar of short English dialogues and a gold scorer that knows their true quality."""
