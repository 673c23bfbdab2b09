//go:build windows || plan9

package fileflash

// syncDir has no counterpart here: names are durable with the file.
func syncDir(string) error { return nil }
