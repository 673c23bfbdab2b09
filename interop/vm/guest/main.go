//go:build linux

// Guest is /init of the virtual machine: it loads the modules, tries the packages for
// Linux's devices, says on the console what came of it, and hangs until the watchdog ends
// that.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/health"
	"github.com/slotota/ota/boot/uboot"
	"github.com/slotota/ota/flash/mtdflash"
	"github.com/slotota/ota/flash/ubiflash"
	"github.com/slotota/ota/flashtest"
	"github.com/slotota/ota/watchdog"
)

func main() {
	defer func() { _ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART) }() // qemu -no-reboot ends
	for _, m := range []string{"devtmpfs /dev", "proc /proc", "sysfs /sys"} {
		kind, at, _ := strings.Cut(m, " ")
		if err := unix.Mount(kind, at, kind, 0, ""); err != nil {
			fmt.Println("mount", m, err)
		}
	}
	list, err := os.ReadFile("/modules/list")
	if err != nil {
		fmt.Println(err)
	}
	for line := range strings.Lines(string(list)) {
		name, params, _ := strings.Cut(strings.TrimSpace(line), " ")
		if err := insert("/modules/"+name, params); err != nil {
			fmt.Println("module", name, err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	for _, test := range []struct {
		name string
		run  func(context.Context, func(string, ...any)) error
	}{{"mtdram", mtdram}, {"nand", nand}, {"ubi", ubi}, {"environment", environment}, {"watchdog", dog}} {
		logf := func(format string, args ...any) { fmt.Printf("VM-LOG "+test.name+": "+format+"\n", args...) }
		if err := test.run(ctx, logf); err != nil {
			fmt.Printf("VM-FAIL %s: %v\n", test.name, err)
			continue
		}
		fmt.Printf("VM-OK %s\n", test.name)
	}
	if _, err := watchdog.Open("", &watchdog.Options{Timeout: 2 * time.Second}); err != nil {
		fmt.Println("VM-FAIL", err)
		return
	}
	fmt.Println("VM-HANG")
	time.Sleep(time.Minute)
	fmt.Println("VM-SURVIVED")
	time.Sleep(200 * time.Millisecond) // for the serial console
}

func insert(path, params string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), params, 0)
}

// device returns the MTD device whose name contains what.
func device(what string) (string, error) {
	b, err := os.ReadFile("/proc/mtd")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, what) {
			dev, _, _ := strings.Cut(line, ":")
			return "/dev/" + dev, nil
		}
	}
	return "", fmt.Errorf("no %s in %s", what, b)
}

func fill(n int64, seed byte) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

func mtdram(_ context.Context, logf func(string, ...any)) error {
	dev, err := device("mtdram")
	if err != nil {
		return err
	}
	f, err := mtdflash.Open(dev, nil)
	if err != nil {
		return err
	}
	logf("%+v", f.Info())
	return errors.Join(flashtest.Test(f), f.Sync(), f.Close())
}

func nand(_ context.Context, logf func(string, ...any)) error {
	dev, err := device("NAND simulator partition 0")
	if err != nil {
		return err
	}
	f, err := mtdflash.Open(dev, &mtdflash.Options{Size: 40 * 128 << 10})
	if err != nil {
		return err
	}
	i := f.Info()
	spare := f.Spare()
	logf("%+v, %d bytes, %d spare blocks", i, f.Size(), spare)
	if blocks := i.Size / i.EraseSize; int64(spare) != blocks-3-40 {
		return fmt.Errorf("%d spare blocks of %d, with 3 bad ones", spare, blocks)
	}
	if err := flashtest.Test(f); err != nil {
		return err
	}
	// The weak blocks die on the way.
	for round := range byte(5) {
		data := fill(f.Size(), round)
		for try := 0; ; try++ {
			err := f.Erase(0, f.Size())
			if err == nil {
				_, err = f.WriteAt(data, 0)
			}
			if err == nil {
				break
			}
			logf("round %d: %v", round, err)
			if try == 4 {
				return err
			}
		}
		again, err := mtdflash.Open(dev, &mtdflash.Options{Size: f.Size(), ReadOnly: true})
		if err != nil {
			return err
		}
		for _, g := range []*mtdflash.Flash{f, again} {
			got := make([]byte, len(data))
			if _, err := g.ReadAt(got, 0); err != nil {
				return err
			}
			if !bytes.Equal(got, data) {
				return fmt.Errorf("round %d: read differs", round)
			}
		}
		if err := again.Close(); err != nil {
			return err
		}
	}
	logf("%d spare blocks left", f.Spare())
	if f.Spare() != spare-2 {
		return fmt.Errorf("%d spare blocks, of %d; two were weak", f.Spare(), spare)
	}
	return f.Close()
}

// attach is struct ubi_attach_req, mkvol struct ubi_mkvol_req.
type attach struct {
	ubi, mtd, vid int32
	beb           int16
	_             [10]int8
}

type mkvol struct {
	id, align int32
	bytes     int64
	kind      int8
	_         int8
	nameLen   int16
	_         [4]int8
	name      [128]byte
}

func ioctl(path string, req uint, arg unsafe.Pointer) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(req), uintptr(arg)); e != 0 {
		return e
	}
	return nil
}

func ubi(_ context.Context, logf func(string, ...any)) error {
	dev, err := device("NAND simulator partition 1")
	if err != nil {
		return err
	}
	var num int32
	if _, err := fmt.Sscanf(dev, "/dev/mtd%d", &num); err != nil {
		return err
	}
	if err := ioctl("/dev/ubi_ctrl", unix.UBI_IOCATT, unsafe.Pointer(&attach{ubi: 0, mtd: num})); err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	for i, v := range []struct {
		name string
		kind int8
		size int64
	}{{"a", 3, 1 << 20}, {"b", 3, 1 << 20}, {"static", 4, 512 << 10}, {"env", 3, 300 << 10}, {"env2", 3, 300 << 10}} {
		req := mkvol{id: int32(i), align: 1, bytes: v.size, kind: v.kind, nameLen: int16(len(v.name))}
		copy(req.name[:], v.name)
		if err := ioctl("/dev/ubi0", unix.UBI_IOCMKVOL, unsafe.Pointer(&req)); err != nil {
			return fmt.Errorf("volume %s: %w", v.name, err)
		}
	}
	if _, err := mtdflash.Open("/dev/ubi0_0", nil); err == nil {
		return errors.New("mtdflash opened a UBI volume")
	}
	for _, path := range []string{"/dev/ubi0_1", "ubi0:static"} {
		f, err := ubiflash.Open(path, nil)
		if err != nil {
			return err
		}
		i, err := f.Info()
		if err != nil {
			return err
		}
		logf("%s: %+v", path, i)
		for round, n := range []int64{200_001, f.Size(), 5, 0} {
			data := fill(n, byte(round))
			if n == 0 { // begun, and begun anew
				if _, err := f.WriteAt(fill(4096, 1), 0); err != nil {
					return err
				}
				data = fill(1000, 9)
			}
			for off := 0; off < len(data); {
				k := min(7777, len(data)-off)
				if _, err := f.WriteAt(data[off:off+k], int64(off)); err != nil {
					return err
				}
				off += k
			}
			if _, err := f.WriteAt([]byte{1}, 99999); !errors.Is(err, ubiflash.ErrOrder) {
				return fmt.Errorf("a write out of order: %v", err)
			}
			if err := f.Sync(); err != nil {
				return err
			}
			got := make([]byte, f.Size())
			if _, err := f.ReadAt(got, 0); err != nil {
				return fmt.Errorf("round %d: %w", round, err)
			}
			if !bytes.Equal(got[:len(data)], data) || bytes.Count(got[len(data):], []byte{0xff}) != len(got)-len(data) {
				return fmt.Errorf("%s, round %d: read differs", path, round)
			}
		}
		// Interrupted.
		if _, err := f.WriteAt(fill(50_000, 3), 0); err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
		if f, err = ubiflash.Open(path, nil); err != nil {
			return err
		}
		if _, err := f.ReadAt(make([]byte, 10), 0); !errors.Is(err, ubiflash.ErrInterrupted) {
			return fmt.Errorf("%s: read after an interrupted update: %v", path, err)
		}
		if _, err := f.WriteAt(fill(f.Size(), 4), 0); err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	for _, size := range []int64{0, 4096} {
		l, err := ubiflash.OpenLEB("ubi0:a", 2, size)
		if err != nil {
			return err
		}
		if err := errors.Join(flashtest.Test(l), l.Close()); err != nil {
			return fmt.Errorf("block of %d bytes: %w", size, err)
		}
	}
	if err := ubiflash.Swap("/dev/ubi0", ubiflash.Pair{A: "a", B: "b"}); err != nil {
		return err
	}
	for path, want := range map[string]string{"/dev/ubi0_0": "b", "/dev/ubi0_1": "a"} {
		f, err := ubiflash.Open(path, &ubiflash.Options{ReadOnly: true})
		if err != nil {
			return err
		}
		i, err := f.Info()
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
		if i.Name != want {
			return fmt.Errorf("%s is named %s", path, i.Name)
		}
	}
	return nil
}

// environment has U-Boot's environment on MTD, NOR-like and NAND, and in UBI.
func environment(ctx context.Context, logf func(string, ...any)) error {
	ram, err := device("mtdram")
	if err != nil {
		return err
	}
	raw, err := device("NAND simulator partition 2")
	if err != nil {
		return err
	}
	for _, config := range []string{
		ram + " 0x0 0x4000 0x10000\n" + ram + " 0x10000 0x4000 0x10000\n",
		raw + " 0x0 0x4000 0x20000 4\n" + raw + " 0x80000 0x4000 0x20000 4\n",
		"/dev/ubi0:env 0x0 0x4000\n/dev/ubi0:env2 0x0 0x4000\n",
	} {
		ls, err := uboot.ParseConfig(strings.NewReader(config))
		if err != nil {
			return err
		}
		// One valid copy, as the factory leaves it.
		f, flags, err := uboot.OpenDevice(ls[0])
		if err != nil {
			return err
		}
		logf("%s: %d bytes, erase unit %d, flags %d", ls[0].Path, f.Size(), eraseSize(f), flags)
		if e, ok := f.(ota.Eraser); ok {
			if err := e.Erase(0, e.EraseSize()); err != nil {
				return err
			}
		}
		image, err := factory(ls[0].Size)
		if err != nil {
			return err
		}
		if _, err := f.WriteAt(image, 0); err != nil {
			return err
		}
		if c, ok := f.(interface{ Close() error }); ok {
			if err := c.Close(); err != nil {
				return err
			}
		}
		if err := os.WriteFile("/fw_env.config", []byte(config), 0o600); err != nil {
			return err
		}
		for i := range 5 {
			env, err := uboot.Open(&uboot.Config{File: "/fw_env.config", Locks: []string{"/lock"}})
			if err != nil {
				return err
			}
			if err := env.Write(ctx, uboot.Set("n", fmt.Sprint(i))); err != nil {
				return fmt.Errorf("%s: write %d: %w", ls[0].Path, i, err)
			}
			vars, err := env.Read(ctx)
			if err != nil {
				return err
			}
			n, _ := vars.Get("n")
			if keep, _ := vars.Get("keep"); keep != "me" || n != fmt.Sprint(i) {
				return fmt.Errorf("%s: %v", ls[0].Path, vars)
			}
		}
	}
	return nil
}

func eraseSize(f ota.Flash) int64 {
	_, n := ota.EraseUnit(f, 0)
	return n
}

func dog(ctx context.Context, logf func(string, ...any)) error {
	state := func() string {
		b, _ := os.ReadFile("/sys/class/watchdog/watchdog0/state")
		return strings.TrimSpace(string(b))
	}
	o := &watchdog.Options{Timeout: 7 * time.Second}
	for _, disarm := range []bool{true, false} {
		w, err := watchdog.Open("", o)
		if err != nil {
			return err
		}
		logf("%+v, %v, %s", w.Info(), w.Timeout(), state())
		if w.Timeout() != 7*time.Second || state() != "active" {
			return fmt.Errorf("timeout %v, %s", w.Timeout(), state())
		}
		if _, err := watchdog.Open("", o); !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("opened twice: %v", err)
		}
		if err := w.Keepalive(ctx); err != nil {
			return err
		}
		want := "active"
		if disarm {
			if err := w.Disarm(ctx); err != nil {
				return err
			}
			want = "inactive"
		}
		if err := w.Close(); err != nil {
			return err
		}
		if state() != want {
			return fmt.Errorf("after Close (disarmed: %v): %s", disarm, state())
		}
	}
	for _, f := range health.Check(ctx, nil) {
		logf("%s: %s", f.ID, f.What)
		if f.ID == health.WatchdogIdle || f.ID == health.PanicHalts || f.ID == health.PanicEarly {
			return fmt.Errorf("found: %+v", f)
		}
	}
	return nil
}
