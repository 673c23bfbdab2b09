//go:build windows || plan9

package fileflash

// syncPath has no counterpart here: names are durable with the file.
func syncPath(string) error { return nil }
