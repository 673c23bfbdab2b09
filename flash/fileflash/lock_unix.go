//go:build linux || darwin || freebsd || netbsd || openbsd || dragonfly

package fileflash

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// lock keeps others who lock out, until f is closed.
func lock(f *os.File) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := conn.Control(func(fd uintptr) {
		err = syscall.Flock(int(fd), syscall.LOCK_EX|syscall.LOCK_NB)
	}); cerr != nil {
		return cerr
	}
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return fmt.Errorf("locked by another opener: %w", ErrInUse)
	}
	if err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	return nil
}
