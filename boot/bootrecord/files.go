package bootrecord

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/slotota/ota"
)

// tempSuffix is what the name of a copy's file ends with until it is complete.
const tempSuffix = ".slotrec~"

// Files returns the record whose copies are plain files, for daemons without raw
// flash. Each has a directory that exists; best are directories on different
// file systems, or better disks. A file that does not exist is a blank copy, so
// make sure that the file systems are mounted.
//
// A copy is replaced by writing a new file, with fsync, renaming it and fsync of
// the directory (not on Windows, which has no such thing). What an interrupted
// write leaves behind is removed by [Record.Heal] and by the next write. Only
// one process may write.
func Files(paths []string, o *Options) (*Record, error) {
	return files(paths, o, osFiles{})
}

func files(paths []string, o *Options, fsys fileSystem) (*Record, error) {
	places := make([]place, len(paths))
	abs := make([]string, len(paths))
	for i, p := range paths {
		if p == "" {
			return nil, fmt.Errorf("bootrecord: copy %d: no path: %w", i, ota.ErrInvalid)
		}
		var err error
		if abs[i], err = filepath.Abs(p); err != nil {
			return nil, fmt.Errorf("bootrecord: copy %d: %w", i, err)
		}
		for j, q := range abs[:i] {
			if q == abs[i] || q+tempSuffix == abs[i] || q == abs[i]+tempSuffix {
				return nil, fmt.Errorf("bootrecord: copies %d and %d: same file %s: %w", j, i, ota.Quote(p), ota.ErrInvalid)
			}
		}
		places[i] = &filePlace{path: abs[i], fsys: fsys}
	}
	return newRecord(places, o)
}

// fileSystem is what the file places need of one.
type fileSystem interface {
	// read returns at most MaxSize bytes of a regular file, no bytes if there
	// is no such file in an existing directory.
	read(name string) ([]byte, error)
	// create makes a new file.
	create(name string) (newFile, error)
	rename(from, to string) error
	remove(name string) error
	syncDir(name string) error
}

type newFile interface {
	io.WriteCloser
	Sync() error
}

// filePlace keeps a copy in a file.
type filePlace struct {
	path string
	fsys fileSystem
}

func (p *filePlace) read() ([]byte, error) { return p.fsys.read(p.path) }

func (p *filePlace) tidy() {
	// What remains does no harm, and an error would not help anybody.
	_ = p.fsys.remove(p.path + tempSuffix)
}

func (p *filePlace) write(rec []byte) error {
	temp := p.path + tempSuffix
	if err := p.fsys.remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := p.fsys.create(temp)
	if err != nil {
		return err
	}
	_, err = f.Write(rec)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = p.fsys.rename(temp, p.path)
	}
	if err != nil {
		p.tidy()
		return err
	}
	return p.fsys.syncDir(filepath.Dir(p.path))
}

// osFiles is the file system of the operating system.
type osFiles struct{}

func (osFiles) read(name string) ([]byte, error) {
	// Opening something else than a file, such as a FIFO, might wait for ever.
	info, err := os.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		_, err = os.Stat(filepath.Dir(name))
		return nil, err
	}
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file: %w", ota.Quote(name), ota.ErrInvalid)
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, MaxSize))
}

func (osFiles) create(name string) (newFile, error) {
	return os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
}

// rename syncs the file under its new name: until then Linux leaves it without
// content on FAT, whatever happens to the directory.
func (osFiles) rename(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return syncPath(to)
}

func (osFiles) remove(name string) error { return os.Remove(name) }

func (osFiles) syncDir(name string) error { return syncPath(name) }

// syncPath syncs a file or directory.
func syncPath(name string) error {
	if runtime.GOOS == "windows" {
		return nil // not possible for what is open for reading only
	}
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	return err
}
