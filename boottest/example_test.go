package boottest_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boottest"
)

// fileLoader keeps the boot state in one file, for a boot stage that reads it.
// (A file that can be lost as a whole is not much for a real device: see
// boot/bootrecord.)
type fileLoader struct {
	path    string
	running ota.SlotID // of the kernel command line, say
}

// plain is a BootState without its short JSON form.
type plain ota.BootState

// Running is found out from the system that runs, never from the file.
func (l *fileLoader) Running(context.Context) (ota.SlotID, error) { return l.running, nil }

func (l *fileLoader) Load(ctx context.Context) (ota.BootState, error) {
	if err := ctx.Err(); err != nil {
		return ota.BootState{}, err
	}
	b, err := os.ReadFile(l.path)
	if errors.Is(err, fs.ErrNotExist) {
		return ota.BootState{}, fmt.Errorf("fileloader: %w", ota.ErrNoBootState)
	}
	if err != nil {
		return ota.BootState{}, err // it may be there
	}
	var p plain
	if err := json.Unmarshal(b, &p); err != nil {
		return ota.BootState{}, fmt.Errorf("fileloader: %w: %w", ota.ErrBadBootState, err)
	}
	return ota.BootState(p), nil
}

func (l *fileLoader) Store(ctx context.Context, s ota.BootState) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if s.Active < 0 || s.Active >= ota.MaxSlots || s.Revert < ota.NoSlot || s.Revert >= ota.MaxSlots {
		return fmt.Errorf("fileloader: active slot %d, revert slot %d: %w", s.Active, s.Revert, ota.ErrUnknownSlot)
	}
	b, err := json.Marshal(plain(s))
	if err != nil {
		return err
	}
	// Atomic by rename, durable by syncing file and directory.
	temp := l.path + "~"
	f, err := os.Create(temp)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(temp, l.path)
	}
	if err != nil || runtime.GOOS == "windows" {
		return err
	}
	d, err := os.Open(filepath.Dir(l.path))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// A Bootloader of one's own, checked. In a test this is
//
//	boottest.Run(t, func(*testing.T) ota.Bootloader { return &fileLoader{path, 1} })
func Example() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	fmt.Println(boottest.Check(context.Background(), func() (ota.Bootloader, error) {
		return &fileLoader{filepath.Join(dir, "bootstate"), 1}, nil
	}))
	// Output: <nil>
}
