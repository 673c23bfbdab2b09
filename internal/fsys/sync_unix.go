//go:build unix

package fsys

import (
	"errors"
	"os"
)

// syncPath syncs a file or directory.
func syncPath(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
