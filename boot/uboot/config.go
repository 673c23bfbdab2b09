package uboot

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/slotota/ota"
	"github.com/slotota/ota/internal/filelock"
	"github.com/slotota/ota/internal/fsys"
)

// Location is where a copy of the environment is: one line of fw_env.config.
type Location struct {
	Path   string // of a device or file
	Offset int64  // negative: from the end
	Size   int64  // of the environment
	// SectorSize and Sectors are the erase unit and the number of units set
	// aside; 0 where the line does not say.
	SectorSize, Sectors int64
	// NoLock says that the sectors need no unlocking.
	NoLock bool
}

// ParseConfig reads a fw_env.config: up to two lines "device offset size
// [sector-size [sectors [no-unlock]]]", numbers as in C, comments with "#"
// (u-boot, tools/env/fw_env.config). Errors wrap [ota.ErrInvalid] and name the
// line.
func ParseConfig(r io.Reader) ([]Location, error) {
	var ls []Location
	sc := bufio.NewScanner(io.LimitReader(r, 64<<10))
	for n := 1; sc.Scan(); n++ {
		line, _, _ := strings.Cut(sc.Text(), "#")
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		l, err := parseLocation(f)
		if err != nil {
			return nil, fmt.Errorf("uboot: configuration, line %d: %w: %w", n, err, ota.ErrInvalid)
		}
		ls = append(ls, l)
		if len(ls) == 2 {
			break // the tools ignore the rest
		}
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("uboot: configuration: %w", err)
	}
	if len(ls) == 0 {
		return nil, fmt.Errorf("uboot: configuration: names no device: %w", ota.ErrInvalid)
	}
	if len(ls) == 2 && ls[0].Size != ls[1].Size {
		return nil, fmt.Errorf("uboot: configuration: copies of %d and %d bytes: %w", ls[0].Size, ls[1].Size, ota.ErrInvalid)
	}
	return ls, nil
}

func parseLocation(f []string) (l Location, err error) {
	if len(f) < 3 || len(f) > 6 {
		return l, fmt.Errorf("%d fields", len(f))
	}
	l.Path = f[0]
	for i, p := range []*int64{&l.Offset, &l.Size, &l.SectorSize, &l.Sectors} {
		if i+1 >= len(f) {
			break
		}
		if *p, err = strconv.ParseInt(f[i+1], 0, 64); err != nil || i > 0 && *p < 0 {
			return l, fmt.Errorf("number %s", ota.Quote(f[i+1]))
		}
	}
	l.NoLock = len(f) == 6 && f[5] != "0"
	if l.Size < minSize || l.Size > maxSize {
		return l, fmt.Errorf("environment of %d bytes", l.Size)
	}
	return l, nil
}

// Config says where the environment is.
type Config struct {
	// File is the path of fw_env.config; "" means /etc/fw_env.config.
	File string
	// Options are those of the environment; Size comes from the file. Flags is
	// taken from the kind of storage unless it is [Boolean] here.
	Options EnvOptions
	// OpenFlash opens the storage of a copy that is neither a regular file nor a
	// block device, such as /dev/mtd0. It returns the region that starts with the
	// environment, and the scheme that goes with it. nil means [OpenDevice].
	OpenFlash func(l Location) (ota.Flash, Flags, error)
	// Locks are files that are locked while the environment is read or
	// written. nil means those of fw_printenv and fw_setenv, old and new.
	Locks []string
}

// defaultLocks are the lock files of libubootenv and of U-Boot's own tools, which
// moved theirs from the one directory to the other.
var defaultLocks = []string{"/var/lock/fw_printenv.lock", "/run/fw_printenv.lock"}

// Open returns the environment that fw_printenv and fw_setenv use: the one that
// fw_env.config describes. c may be nil.
func Open(c *Config) (*Env, error) {
	if c == nil {
		c = &Config{}
	}
	name := c.File
	if name == "" {
		name = "/etc/fw_env.config"
	}
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("uboot: %w", err)
	}
	ls, err := ParseConfig(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	o := c.Options
	var copies []ota.Flash
	for _, l := range ls {
		f, scheme, err := openLocation(c, l, len(ls) == 1)
		if err != nil {
			return nil, fmt.Errorf("uboot: %w", err)
		}
		copies = append(copies, f)
		o.Size = l.Size
		o.Flags = max(o.Flags, scheme)
	}
	e, err := NewEnv(copies, &o)
	if err != nil {
		return nil, err
	}
	locks := c.Locks
	if locks == nil {
		locks = defaultLocks
	}
	e.lock = func(ctx context.Context) (func(), error) {
		unlock, err := filelock.Lock(ctx, locks)
		if err != nil {
			err = fmt.Errorf("uboot: %w", err)
		}
		return unlock, err
	}
	return e, nil
}

func openLocation(c *Config, l Location, single bool) (ota.Flash, Flags, error) {
	openFlash := c.OpenFlash
	if openFlash == nil {
		openFlash = OpenDevice
	}
	info, err := os.Stat(l.Path)
	if errors.Is(err, fs.ErrNotExist) && strings.Contains(filepath.Base(l.Path), ":") { // ubi0:env
		return openFlash(l)
	}
	if err != nil {
		return nil, 0, err
	}
	mode := info.Mode()
	block := mode&os.ModeDevice != 0 && mode&os.ModeCharDevice == 0
	if !mode.IsRegular() && !block {
		return openFlash(l)
	}
	f := file{path: l.Path, off: l.Offset, size: l.Size}
	if l.Offset < 0 {
		end, err := f.end()
		if err != nil {
			return nil, 0, err
		}
		f.off = end + l.Offset
	}
	if f.off < 0 {
		return nil, 0, fmt.Errorf("%s: offset %d: %w", ota.Quote(l.Path), l.Offset, ota.ErrInvalid)
	}
	if single && mode.IsRegular() && f.off == 0 && info.Size() == l.Size {
		return &wholeFile{f}, Incremental, nil
	}
	return &f, Incremental, nil
}

// file is the environment's part of a file or block device. It is opened for each
// access: the disk around it is usually mounted, and nobody may be kept from it.
type file struct {
	path      string
	off, size int64
}

func (f *file) Size() int64 { return f.size }

func (f *file) with(flag int, do func(*os.File) error) error {
	h, err := os.OpenFile(f.path, flag, 0)
	if err != nil {
		return err
	}
	return errors.Join(do(h), h.Close())
}

func (f *file) end() (n int64, err error) {
	err = f.with(os.O_RDONLY, func(h *os.File) error {
		n, err = h.Seek(0, io.SeekEnd)
		return err
	})
	return n, err
}

func (f *file) ReadAt(p []byte, off int64) (n int, err error) {
	err = f.with(os.O_RDONLY, func(h *os.File) error {
		n, err = h.ReadAt(p, f.off+off)
		return err
	})
	return n, err
}

// WriteAt returns when the bytes are on the medium.
func (f *file) WriteAt(p []byte, off int64) (n int, err error) {
	err = f.with(os.O_WRONLY, func(h *os.File) error {
		if n, err = h.WriteAt(p, f.off+off); err != nil {
			return err
		}
		return h.Sync()
	})
	return n, err
}

func (f *file) Sync() error { return nil } // see WriteAt

// wholeFile is a file that holds nothing but the only copy.
type wholeFile struct{ file }

// replaceAll puts a new file in the place of the old one.
func (f *wholeFile) replaceAll(b []byte) error {
	path, err := filepath.EvalSymlinks(f.path)
	if err != nil {
		return err
	}
	return fsys.Replace(fsys.OS{}, filepath.ToSlash(path), b)
}
