package fsys

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
)

// Sector is what storage writes at once.
const Sector = 512

// Overwriter is a file system whose files can be changed where they are.
type Overwriter interface {
	FS
	// OverwriteSector replaces the first sector of a file of at least that
	// size, and syncs it: after a power cut it is the old one or the new one,
	// also for a boot loader that knows nothing of journals.
	OverwriteSector(name string, b *[Sector]byte) error
}

// OverwriteSector implements [Overwriter].
func (o OS) OverwriteSector(name string, b *[Sector]byte) error {
	f, err := os.OpenFile(o.path(name), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	var old [Sector]byte
	if _, err = io.ReadFull(f, old[:]); err == nil {
		_, err = f.WriteAt(b[:], 0)
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// OverwriteSector implements [Overwriter].
func (s *Sim) OverwriteSector(name string, b *[Sector]byte) error {
	old, ok := s.disk.Files[name]
	if !ok {
		return missing("open", name)
	}
	if len(old) < Sector {
		return fmt.Errorf("%s: %w", name, fs.ErrInvalid)
	}
	s.disk.Files[name] = slices.Concat(b[:], old[Sector:])
	if err := s.commit(); err != nil {
		return err
	}
	if _, ok := s.disk.Durable[name]; ok {
		s.disk.Durable[name] = s.disk.Files[name]
	}
	return s.commit()
}
