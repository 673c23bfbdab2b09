// Package efisim simulates the variables of UEFI firmware on a file system that
// can be cut off at each operation.
package efisim

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"

	"github.com/slotota/ota/internal/fsys"
)

// Vars are files in a directory Dir of FS. A Set or Delete that is cut off has
// happened or it has not, as firmware promises.
type Vars struct {
	FS  fsys.FS
	Dir string
}

const half = ".new" // of a Set that was cut off

// List implements the interface of package boot/efi.
func (v Vars) List() ([]string, error) {
	all, err := v.FS.ReadDir(v.Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var names []string
	for _, n := range all {
		if !strings.HasSuffix(n, half) {
			names = append(names, n)
		}
	}
	return names, nil
}

// Get implements the interface of package boot/efi.
func (v Vars) Get(name string) (attrs uint32, data []byte, err error) {
	b, err := v.FS.ReadFile(path.Join(v.Dir, name))
	if err != nil {
		return 0, nil, err
	}
	if len(b) < 5 {
		return 0, nil, fmt.Errorf("variable %s of %d bytes", name, len(b))
	}
	return binary.LittleEndian.Uint32(b), b[4:], nil
}

// Set implements the interface of package boot/efi.
func (v Vars) Set(name string, attrs uint32, data []byte) error {
	b := binary.LittleEndian.AppendUint32(nil, attrs)
	return fsys.Replace(v.FS, path.Join(v.Dir, name), append(b, data...))
}

// Delete implements the interface of package boot/efi.
func (v Vars) Delete(name string) error {
	if err := v.FS.Remove(path.Join(v.Dir, name)); err != nil {
		return err
	}
	return v.FS.SyncDir(v.Dir)
}
