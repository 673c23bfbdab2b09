// Package fsys is what drivers of boot loaders need of a file system: few
// operations, so that a simulated one ([Sim]) can be cut off at each.
package fsys

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	"github.com/slotota/ota"
)

// Sector is what storage writes at once.
const Sector = 512

// MaxFile bounds the files that are read whole.
const MaxFile = 1 << 20

// FS is a file system. Names are slash-separated and absolute within it.
type FS interface {
	// ReadFile returns the content of a file of at most MaxFile bytes.
	ReadFile(name string) ([]byte, error)
	// Open opens a file of any size for reading.
	Open(name string) (File, error)
	// ReadDir returns the names in a directory, sorted.
	ReadDir(name string) ([]string, error)
	// WriteFile creates or truncates a file, writes b, and syncs it.
	WriteFile(name string, b []byte) error
	// Overwrite writes b over the content of a file of the same length, where it
	// is on the medium, and syncs it: also for a boot loader that knows nothing of
	// journals. A power cut may leave the first sectors new and the others old.
	Overwrite(name string, b []byte) error
	// Rename gives a file another name, in the place of a file that has it.
	Rename(from, to string) error
	// Remove removes a file.
	Remove(name string) error
	// SyncDir makes the names in a directory durable.
	SyncDir(name string) error
}

// File is an open file.
type File interface {
	io.ReaderAt
	io.Closer
}

// Replace makes the named file hold b: after a power cut it has its old content or
// the new one.
func Replace(f FS, name string, b []byte) error {
	tmp := name + ".new"
	err := f.WriteFile(tmp, b)
	if o, ok := f.(OS); ok && err == nil {
		err = o.copyMode(name, tmp)
	}
	if err == nil {
		err = f.Rename(tmp, name)
	}
	if err != nil {
		// That there is no such file is not why it failed.
		if rerr := f.Remove(tmp); !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
		return err
	}
	return f.SyncDir(path.Dir(name))
}

// Move gives a file another name, durably. It refuses to replace a file.
func Move(f FS, from, to string) error {
	if _, err := f.ReadFile(to); !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(&fs.PathError{Op: "rename", Path: to, Err: fs.ErrExist}, err)
	}
	if err := f.Rename(from, to); err != nil {
		return err
	}
	return f.SyncDir(path.Dir(to))
}

// OS is the file system of the operating system, below the directory Root; "" is
// its root.
type OS struct{ Root string }

func (o OS) path(name string) string {
	if o.Root == "" {
		return filepath.FromSlash(name)
	}
	return filepath.Join(o.Root, filepath.FromSlash(name))
}

// ReadFile implements [FS].
func (o OS) ReadFile(name string) ([]byte, error) {
	f, err := os.Open(o.path(name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	if err == nil && len(b) > MaxFile {
		err = fmt.Errorf("%s: more than %d bytes: %w", ota.Quote(name), MaxFile, ota.ErrTooLarge)
	}
	return b, err
}

// Open implements [FS].
func (o OS) Open(name string) (File, error) {
	f, err := os.Open(o.path(name))
	if err != nil {
		return nil, err
	}
	return f, nil
}

// ReadDir implements [FS].
func (o OS) ReadDir(name string) ([]string, error) {
	es, err := os.ReadDir(o.path(name))
	var names []string
	for _, e := range es {
		names = append(names, e.Name())
	}
	return names, err
}

// WriteFile implements [FS]. A file that exists keeps its mode.
func (o OS) WriteFile(name string, b []byte) error {
	f, err := os.OpenFile(o.path(name), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// Overwrite implements [FS].
func (o OS) Overwrite(name string, b []byte) error {
	f, err := os.OpenFile(o.path(name), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil && info.Size() != int64(len(b)) {
		err = &fs.PathError{Op: "overwrite", Path: name, Err: fs.ErrInvalid}
	}
	if err == nil {
		_, err = f.WriteAt(b, 0)
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// copyMode gives a file the mode of another one, if there is one.
func (o OS) copyMode(from, to string) error {
	info, err := os.Stat(o.path(from))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return os.Chmod(o.path(to), info.Mode().Perm())
}

// Rename implements [FS]. On FAT, Linux notes where the content of the file is under
// the new name when it syncs the file, not when it syncs the directory (6.1,
// fs/fat/namei_vfat.c, vfat_rename); until then a power cut leaves an empty file, or
// one in clusters that were freed.
func (o OS) Rename(from, to string) error {
	if err := os.Rename(o.path(from), o.path(to)); err != nil {
		return err
	}
	return syncPath(o.path(to))
}

// Remove implements [FS].
func (o OS) Remove(name string) error { return os.Remove(o.path(name)) }

// SyncDir implements [FS].
func (o OS) SyncDir(name string) error { return syncPath(o.path(name)) }
