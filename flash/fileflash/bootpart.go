package fileflash

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/slotota/ota"
)

// BootPartition is a [File] in a boot partition of an eMMC, which the kernel keeps
// read-only unless told otherwise. Close makes it read-only again.
type BootPartition struct {
	*File
	forceRO string // file in sys; "" if it was writable before
	once    sync.Once
	err     error
}

// OpenBootPartition opens the boot partition of an eMMC at path, such as
// /dev/mmcblk0boot1, to read and write, as [Open] does. The kernel's protection, force_ro,
// is lifted until Close (torvalds/linux, Documentation/driver-api/mmc/mmc-dev-parts.rst).
// If the process ends before Close the partition stays writable until the next boot. A
// protection by the eMMC itself cannot be lifted: writes fail then.
//
// With Options.ReadOnly nothing is lifted. o may be nil.
func OpenBootPartition(path string, o *Options) (*BootPartition, error) {
	return openBootPartition("/sys", path, o)
}

func openBootPartition(sys, path string, o *Options) (*BootPartition, error) {
	if o == nil {
		o = &Options{}
	}
	fail := func(err error) (*BootPartition, error) {
		return nil, fmt.Errorf("fileflash: open %s: %w", strconv.Quote(path), err)
	}
	if o.Create {
		return fail(fmt.Errorf("a boot partition is not created: %w", ota.ErrInvalid))
	}
	b := &BootPartition{}
	if !o.ReadOnly {
		real, err := filepath.EvalSymlinks(path)
		if err != nil {
			return fail(err)
		}
		name := filepath.Join(sys, "block", filepath.Base(real), "force_ro")
		state, err := os.ReadFile(name)
		if err != nil {
			return fail(fmt.Errorf("no boot partition of an eMMC: %w", err))
		}
		if string(bytes.TrimSpace(state)) != "0" {
			if err := setForceRO(name, "0"); err != nil {
				return fail(err)
			}
			b.forceRO = name
		}
	}
	var err error
	if b.File, err = Open(path, o); err != nil {
		return nil, errors.Join(err, b.protect())
	}
	return b, nil
}

// setForceRO writes to a file that exists.
func setForceRO(name, value string) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value + "\n")
	return errors.Join(err, f.Close())
}

func (b *BootPartition) protect() error {
	if b.forceRO == "" {
		return nil
	}
	return setForceRO(b.forceRO, "1")
}

// Close closes the partition and makes it read-only, if it was. It does not sync.
func (b *BootPartition) Close() error {
	b.once.Do(func() { b.err = errors.Join(b.File.Close(), b.protect()) })
	return b.err
}
