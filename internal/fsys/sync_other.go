//go:build !unix

package fsys

// syncPath does nothing: what is not open for writing cannot be synced here.
func syncPath(string) error { return nil }
