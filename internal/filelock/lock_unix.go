//go:build unix

// Package filelock takes locks that other programs take, too.
package filelock

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// lockPoll is the time between two attempts to get a lock.
const lockPoll = 20 * time.Millisecond

// Lock locks all files with flock(2), in their order, and makes them if need be. It
// waits until ctx is done. A directory that does not exist needs no lock.
func Lock(ctx context.Context, names []string) (unlock func(), err error) {
	var held []*os.File
	unlock = func() {
		for _, f := range held {
			f.Close()
		}
	}
	for _, name := range names {
		if _, err := os.Stat(filepath.Dir(name)); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o666)
		if err == nil {
			held = append(held, f)
			if same(held) {
				continue // /var/lock is a link to /run/lock on many systems
			}
			err = flock(ctx, f)
		}
		if err != nil {
			unlock()
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
	}
	return unlock, nil
}

// same reports whether the last of fs is a file that is among the others.
func same(fs []*os.File) bool {
	last, err := fs[len(fs)-1].Stat()
	if err != nil {
		return false
	}
	for _, f := range fs[:len(fs)-1] {
		if info, err := f.Stat(); err == nil && os.SameFile(info, last) {
			return true
		}
	}
	return false
}

func flock(ctx context.Context, f *os.File) error {
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err != syscall.EWOULDBLOCK && err != syscall.EINTR {
			return err
		}
		select {
		case <-time.After(lockPoll):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
