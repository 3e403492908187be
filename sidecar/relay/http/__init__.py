"""HTTP/1.1 over llhttp, bytes in and bytes out: clients on one side, the engine on the other."""
