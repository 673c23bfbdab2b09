//go:build !windows && !plan9

package fileflash

import "os"

// syncPath makes a file durable, or the names in a directory.
func syncPath(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
