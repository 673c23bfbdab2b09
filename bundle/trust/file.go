package trust

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/slotota/ota"
	"github.com/slotota/ota/internal/fsys"
)

// Load returns the newest anchor of two: the chain that is built into the firmware,
// and the one that [Anchor.Save] left in a file, which must agree with the former. A
// file that does not exist is no error, so make sure that its file system is mounted.
// Build the whole chain into every firmware, not its last record only: a device that
// goes back to an older firmware then finds what that one was built with in the file.
//
// Whoever can write to the file can bring back an older record, but no older one than
// builtin, and none of his own. If the file is damaged, which no power cut does, this
// is an error, lest damage brings back keys that were withdrawn: get the chain again,
// pass it to [Anchor.Update] of what Open makes of builtin, and save that.
func Load(name string, builtin []byte) (*Anchor, error) {
	a, err := Open(builtin)
	if err != nil {
		return nil, err
	}
	b, err := readFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return a, nil
	}
	if err == nil {
		var newer *Anchor
		newer, err = a.Update(b)
		switch {
		case err == nil:
			return newer, nil
		case errors.Is(err, ErrOld):
			return a, nil
		}
	}
	return nil, fmt.Errorf("%s: %w", ota.Quote(name), err)
}

func readFile(name string) ([]byte, error) {
	// Opening something else than a file, such as a FIFO, might wait for ever.
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("not a regular file: %w", ota.ErrInvalid)
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, MaxChain+1))
}

// Save replaces the file by the chain. Whenever the power fails, the file is the old
// one or the new one; it is the new one once Save has returned nil. That takes a file
// NAME.new beside it, fsync, a rename, and fsync of the directory (not on Windows, which
// has no such thing). The file keeps its mode. Only one process may write.
func (a *Anchor) Save(name string) error {
	return fsys.Replace(fsys.OS{}, filepath.ToSlash(name), a.Bytes())
}
