package efi

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// immutable is FS_IMMUTABLE_FL (linux, include/uapi/linux/fs.h).
const immutable = 0x10

// unprotect clears the immutable flag of a file, and returns a function that sets
// it again if it was set.
func unprotect(name string) (protect func() error, err error) {
	was, err := setImmutable(name, false)
	if err != nil || !was {
		return func() error { return nil }, err
	}
	return func() error {
		_, err := setImmutable(name, true)
		return err
	}, nil
}

func setImmutable(name string, on bool) (was bool, err error) {
	f, err := os.Open(name)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return false, nil // no efivarfs
	}
	if err != nil {
		return false, &os.PathError{Op: "getflags", Path: name, Err: err}
	}
	was = flags&immutable != 0
	if was == on {
		return was, nil
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(int32(flags^immutable))); err != nil {
		return was, &os.PathError{Op: "setflags", Path: name, Err: err}
	}
	return was, nil
}
