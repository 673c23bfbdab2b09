package efi

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/slotota/ota"
)

// Vendors of variables.
const (
	Global = "8be4df61-93ca-11d2-aa0d-00e098032b8c" // UEFI's own (UEFI 2.10, section 3.3)
	Loader = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f" // boot loader interface (systemd)
)

// Stored are the attributes of a variable that outlasts a reset and can be seen by
// the operating system: NON_VOLATILE, BOOTSERVICE_ACCESS, RUNTIME_ACCESS.
const Stored = 7

// Vars are the variables of UEFI firmware. A name is that of the variable and the
// GUID of its vendor, joined by "-", as in efivarfs and in the tool efivar. Methods
// may be called concurrently; a Set or Delete is complete and durable, or has not
// happened, when it returns nil or an error, or is cut off by the power.
type Vars interface {
	// List returns the names of all variables, in any order.
	List() ([]string, error)
	// Get returns attributes and content. The error wraps [fs.ErrNotExist] if
	// there is no such variable.
	Get(name string) (attrs uint32, data []byte, err error)
	// Set creates or replaces a variable. data has at least one byte.
	Set(name string, attrs uint32, data []byte) error
	// Delete removes a variable. The error wraps [fs.ErrNotExist] if there is
	// none.
	Delete(name string) error
}

// MaxVar is how large variables may be that are read.
const MaxVar = 1 << 20

// Efivarfs are the variables in a mounted efivarfs, or in a directory that looks
// like one: files of four bytes of attributes and the content. Root is its path, ""
// for /sys/firmware/efi/efivars.
//
// The kernel protects most variables from accidents by the immutable flag of the
// file. It is cleared for a change, and set again.
type Efivarfs struct{ Root string }

func (v Efivarfs) path(name string) (string, error) {
	root := v.Root
	if root == "" {
		root = "/sys/firmware/efi/efivars"
	}
	if !filepath.IsLocal(name) || filepath.Base(name) != name {
		return "", fmt.Errorf("efi: variable %s: %w", ota.Quote(name), ota.ErrInvalid)
	}
	return filepath.Join(root, name), nil
}

// List implements [Vars].
func (v Efivarfs) List() ([]string, error) {
	dir, err := v.path(".")
	if err != nil {
		return nil, err
	}
	es, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("efi: %w (is efivarfs mounted?)", err)
	}
	var names []string
	for _, e := range es {
		names = append(names, e.Name())
	}
	return names, nil
}

// Get implements [Vars].
func (v Efivarfs) Get(name string) (attrs uint32, data []byte, err error) {
	p, err := v.path(name)
	if err != nil {
		return 0, nil, err
	}
	f, err := os.Open(p)
	if err != nil {
		return 0, nil, fmt.Errorf("efi: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, MaxVar+1))
	switch {
	case err != nil:
		return 0, nil, fmt.Errorf("efi: %w", err)
	case len(b) == 0:
		// Left behind by a program that created and never wrote it.
		return 0, nil, fmt.Errorf("efi: variable %s is empty: %w", ota.Quote(name), fs.ErrNotExist)
	case len(b) < 4:
		return 0, nil, fmt.Errorf("efi: variable %s of %d bytes: %w", ota.Quote(name), len(b), ErrFormat)
	case len(b) > MaxVar:
		return 0, nil, fmt.Errorf("efi: variable %s: %w", ota.Quote(name), ota.ErrTooLarge)
	}
	return le.Uint32(b), b[4:], nil
}

// Set implements [Vars].
func (v Efivarfs) Set(name string, attrs uint32, data []byte) error {
	p, err := v.path(name)
	if err == nil {
		err = set(p, attrs, data)
	}
	if err != nil {
		return fmt.Errorf("efi: setting variable %s: %w", ota.Quote(name), err)
	}
	return nil
}

func set(p string, attrs uint32, data []byte) (err error) {
	if len(data) == 0 {
		return fmt.Errorf("without content: %w", ota.ErrInvalid)
	}
	protect, err := unprotect(p)
	created := errors.Is(err, fs.ErrNotExist)
	if err != nil && !created {
		return err
	}
	f, err := os.OpenFile(p, os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return errors.Join(err, protect())
	}
	// The whole variable in one write(2): the kernel passes on each.
	b := append(le.AppendUint32(nil, attrs), data...)
	_, err = f.Write(b)
	if err == nil {
		var info fs.FileInfo
		if info, err = f.Stat(); err == nil && info.Size() > int64(len(b)) {
			err = f.Truncate(int64(len(b))) // no efivarfs
		}
	}
	err = errors.Join(err, f.Close())
	if err != nil && created {
		return errors.Join(err, os.Remove(p))
	}
	return errors.Join(err, protect())
}

// Delete implements [Vars].
func (v Efivarfs) Delete(name string) error {
	p, err := v.path(name)
	if err == nil {
		var protect func() error
		if protect, err = unprotect(p); err == nil {
			if err = os.Remove(p); err != nil {
				err = errors.Join(err, protect())
			}
		}
	}
	if err != nil {
		return fmt.Errorf("efi: deleting variable %s: %w", ota.Quote(name), err)
	}
	return nil
}

// SetVerified sets a variable that outlasts a reset and reads it back. It does
// nothing if the variable is like that already, for the firmware's flash wears.
func SetVerified(v Vars, name string, data []byte) error {
	if attrs, old, err := v.Get(name); err == nil && attrs == Stored && slices.Equal(old, data) {
		return nil
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := v.Set(name, Stored, data); err != nil {
		return err
	}
	_, got, err := v.Get(name)
	if err == nil && !slices.Equal(got, data) {
		err = ota.ErrVerify
	}
	if err != nil {
		return fmt.Errorf("efi: reading variable %s back: %w", ota.Quote(name), err)
	}
	return nil
}

// DeleteVerified deletes a variable, if there is one, and looks that it is gone.
func DeleteVerified(v Vars, name string) error {
	if err := v.Delete(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if _, _, err := v.Get(name); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("efi: variable %s is still there: %w", ota.Quote(name), errors.Join(err, ota.ErrVerify))
	}
	return nil
}
