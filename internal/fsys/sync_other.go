//go:build !unix

package fsys

// syncDir does nothing: directories cannot be synced here.
func syncDir(string) error { return nil }
