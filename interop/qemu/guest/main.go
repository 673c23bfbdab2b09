//go:build linux

// Guest is /init of the machines that the tests boot. It is the smallest device
// that uses the library: it finds its slots by their partition names, opens the
// device with the driver of its boot loader, watches over trials, and takes commands
// from the console:
//
//	update URL SECONDS    install the bundle; SECONDS is the commit timeout
//	digests PART=N…       hash the first N bytes of parts of the running slot
//	tool PROGRAM ARG…     run a program of the partition "tools"
//	commit, revert, reboot, poweroff
//	hang                  stop all goroutines, so that nobody feeds the watchdog
//
// Files in the image say what it is: version; parts, the names of the slots' parts;
// modules, kernel modules in the order to load them; key.pem, that of the bundles;
// fault, what goes wrong (exit, hang).
package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/boot/systemdboot"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/fetch"
	"github.com/slotota/ota/flash/fileflash"
	"github.com/slotota/ota/interop/qemu"
	"github.com/slotota/ota/watchdog"
)

// slotNames are what the boot scripts call the slots.
var slotNames = []string{"A", "B"}

func main() {
	fault, _ := os.ReadFile("/fault")
	if string(fault) == "exit" {
		os.Exit(7) // the kernel panics
	}
	for _, m := range [][2]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/run"}} {
		os.MkdirAll(m[1], 0o755)
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			panic(err)
		}
	}
	con, err := os.OpenFile("/dev/console", os.O_RDWR, 0)
	if err != nil {
		panic(err)
	}
	g := &guest{con: con}
	if string(fault) == "hang" {
		g.say(qemu.Hang, "before anything else")
		select {}
	}
	err = g.run(context.Background())
	g.say(qemu.Fail, "%v", err)
	os.Exit(1) // the kernel panics, and panic=N restarts the machine
}

type guest struct {
	con     *os.File
	loader  loader
	version string
	slots   []ota.Slot
	dev     *ota.Device
	policy  *bundle.Policy
	result  ota.UpdateResult
	digests map[string]string
	watched chan struct{} // closed when the trial is over, if there is one
}

func (g *guest) say(kind, format string, args ...any) {
	fmt.Fprintf(g.con, "\n%s%s %s\n", qemu.Prefix, kind, fmt.Sprintf(format, args...))
}

func (g *guest) run(ctx context.Context) error {
	if err := loadModules(); err != nil {
		return err
	}
	name, err := driver.CmdlineParam("", "ota.loader")
	if err != nil {
		return err
	}
	var ok bool
	if g.loader, ok = loaders[name]; !ok {
		return fmt.Errorf("no driver for %q", name)
	}
	release, err := g.feed(ctx)
	if err != nil {
		return err
	}
	if err := network(); err != nil {
		return err
	}
	b, err := os.ReadFile("/version")
	if err != nil {
		return err
	}
	g.version = string(b)
	if b, err = os.ReadFile("/key.pem"); err != nil {
		return err
	}
	key, err := bundle.ParseKey(b)
	if err != nil {
		return err
	}
	g.policy = &bundle.Policy{Keys: []*ecdsa.PublicKey{key}}
	if err := g.open(ctx); err != nil {
		return err
	}
	r := g.report()
	if r.Trial {
		release()
	}
	g.tell(qemu.Ready, r)
	if r.Trial {
		g.watched = make(chan struct{})
		go func() {
			defer close(g.watched)
			defer func() {
				if _, err := g.feed(ctx); err != nil {
					g.say(qemu.Watch, "%v", err)
				}
			}()
			if err := g.dev.Watch(ctx); err != nil {
				g.say(qemu.Watch, "%v", err)
			} else {
				g.say(qemu.Watch, "committed")
			}
		}()
	}
	sc := bufio.NewScanner(g.con)
	for sc.Scan() {
		args := strings.Fields(sc.Text())
		if len(args) == 0 {
			continue
		}
		if err := g.do(ctx, args); err != nil {
			g.say(qemu.Fail, "%s: %v", args[0], err)
			continue
		}
		r := g.report()
		r.Digests = g.digests
		g.tell(qemu.Done, r)
	}
	return errors.Join(sc.Err(), errors.New("the console ended"))
}

func (g *guest) do(ctx context.Context, args []string) error {
	switch args[0] {
	case "update":
		if len(args) != 3 {
			return errors.New("usage: update URL SECONDS")
		}
		n, err := strconv.ParseUint(args[2], 10, 16)
		if err != nil {
			return err
		}
		return g.update(ctx, args[1], time.Duration(n)*time.Second)
	case "commit":
		if err := g.dev.Commit(ctx); err != nil {
			return err
		}
		if g.watched != nil {
			<-g.watched // the watchdog is disarmed
		}
		return nil
	case "revert":
		return g.dev.Revert(ctx)
	case "digests":
		var err error
		g.digests, err = digests(g.slots[g.dev.Running()], args[1:])
		return err
	case "reboot":
		return g.dev.Reboot(ctx)
	case "poweroff":
		unix.Sync()
		return unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	case "tool":
		return g.tool(ctx, args[1:])
	case "hang":
		// Watch may not have armed it yet.
		if err := eventually(func() error {
			if state := watchdogState(); state != "active" {
				return fmt.Errorf("the watchdog is %q", state)
			}
			return nil
		}); err != nil {
			return err
		}
		g.say(qemu.Hang, "with a watchdog")
		return freeze()
	}
	return errors.New("unknown command")
}

func (g *guest) update(ctx context.Context, url string, timeout time.Duration) error {
	p := &fetch.Policy{AllowHTTP: true, AllowPrivate: true}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	client := p.Client()
	defer client.CloseIdleConnections()
	res, err := fetch.Do(client, req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return errors.New(res.Status)
	}
	img, err := g.policy.Open(ctx, res.Body)
	if err != nil {
		return err
	}
	g.result, err = g.dev.Update(ctx, img, &ota.UpdateOptions{CommitTimeout: timeout})
	return err
}

// uptime is the time since the boot, in seconds. On a busy host a guest's clock may run
// many times as fast as the host's.
func uptime() string {
	b, _ := os.ReadFile("/proc/uptime")
	up, _, _ := strings.Cut(string(b), " ")
	return up
}

// watchdogState is what the kernel says about /dev/watchdog: "active" or "inactive".
func watchdogState() string {
	b, err := os.ReadFile("/sys/class/watchdog/watchdog0/state")
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(b))
}

const dogTimeout = 20 * time.Second

// feed feeds the watchdog if the boot loader has armed one, until release is called.
func (g *guest) feed(ctx context.Context) (release func(), err error) {
	if !g.loader.armed {
		return func() {}, nil
	}
	w, err := watchdog.Open("", &watchdog.Options{Timeout: dogTimeout})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-ctx.Done():
				w.Close()
				return
			case <-time.After(dogTimeout / 4):
				if err := w.Keepalive(ctx); err != nil {
					g.say(qemu.Watch, "%v", err)
				}
			}
		}
	}()
	return func() { cancel(); <-done }, nil
}

// freeze stops the process, as a bug in it might: one thread waits for ever, and holds
// what all others need to run Go code.
func freeze() error {
	runtime.LockOSThread()
	runtime.GOMAXPROCS(1)
	var all unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	// Or the scheduler would interrupt the wait.
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &all, nil); err != nil {
		return err
	}
	for {
		unix.RawSyscall6(unix.SYS_PPOLL, 0, 0, 0, 0, 0, 0)
	}
}

// tool runs a program of the partition "tools", which has its libraries too, and says
// what it writes.
func (g *guest) tool(ctx context.Context, args []string) error {
	const dir = "/tools"
	if _, err := os.Stat(dir); err != nil {
		if err := mount("tools", dir, "vfat"); err != nil {
			return err
		}
	}
	if len(args) == 0 {
		return errors.New("usage: tool PROGRAM [ARG]")
	}
	args = append([]string{"--library-path", dir, filepath.Join(dir, args[0])}, args[1:]...)
	out, err := exec.CommandContext(ctx, filepath.Join(dir, "ld-linux-x86-64.so.2"), args...).CombinedOutput()
	for line := range strings.Lines(string(out)) {
		g.say(qemu.Output, "%s", strings.TrimRight(line, "\n"))
	}
	return err
}

// open opens the device.
func (g *guest) open(ctx context.Context) error {
	parts, err := os.ReadFile("/parts")
	if err != nil {
		return err
	}
	l := g.loader
	d, err := l.open()
	if err != nil {
		return err
	}
	for i := range slotNames {
		var s ota.Slot
		for part := range strings.FieldsSeq(string(parts)) {
			f, err := openPart(ctx, l, d, part, ota.SlotID(i))
			if err != nil {
				return err
			}
			s.Parts = append(s.Parts, ota.Part{Name: part, Flash: f})
		}
		g.slots = append(g.slots, s)
	}
	// Two records of three copies each, in one partition.
	f, err := openPartition("state")
	if err != nil {
		return err
	}
	var records []ota.Bootloader
	for i := range int64(2) {
		half, err := ota.Region(f, i*f.Size()/2, f.Size()/2)
		if err != nil {
			return err
		}
		places, err := bootrecord.Split(half, 3)
		if err != nil {
			return err
		}
		r, err := bootrecord.New(places, nil)
		if err != nil {
			return err
		}
		records = append(records, r)
	}
	b, err := driver.New(d, records[0], records[1])
	if err != nil {
		return err
	}
	last := ota.PhaseIdle
	g.dev, err = ota.Open(ctx, b, g.slots, &ota.Options{
		Platform: "qemu",
		Checks:   []ota.Check{{Name: "version", Run: func(context.Context) error { return g.check() }}},
		Reset:    reset,
		Watchdog: watchdog.For("", &watchdog.Options{Timeout: dogTimeout, KeepRunning: l.armed}),
		OnEvent: func(e ota.Event) {
			if e.Phase != last {
				g.say(qemu.Phase, "%v %s", e.Phase, uptime())
			}
			last = e.Phase
		},
	})
	return err
}

// check is the health check: the image that runs is the one that was installed.
func (g *guest) check() error {
	if stored := g.report().Stored; stored != g.version {
		return fmt.Errorf("version %s runs, %s was installed", g.version, stored)
	}
	return nil
}

func reset(context.Context) error {
	unix.Sync()
	return unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

func (g *guest) report() qemu.Report {
	s := g.dev.Status()
	r := qemu.Report{
		Running: int(s.Running), Version: g.version, Active: int(s.State.Active), Committed: s.State.Committed, Trial: s.Trial,
		Outcome: s.State.Last.Outcome.String(), Reason: s.State.Last.Reason.String(), LastSlot: int(s.State.Last.Slot),
		Stored: s.State.Slot(s.Running).Version, Written: g.result.Written, Skipped: g.result.Skipped,
		Watchdog: watchdogState(), Uptime: uptime(),
	}
	if s.Err != nil {
		r.Problem = s.Err.Error()
	}
	return r
}

func (g *guest) tell(kind string, r qemu.Report) {
	b, err := json.Marshal(r)
	if err != nil {
		panic(err)
	}
	g.say(kind, "%s", b)
}

// digests hashes the beginning of the parts of a slot; each of args is the name of a
// part and a number of bytes, NAME=N.
func digests(s ota.Slot, args []string) (map[string]string, error) {
	m := map[string]string{}
	for _, arg := range args {
		name, text, _ := strings.Cut(arg, "=")
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return nil, err
		}
		for _, p := range s.Parts {
			if p.Name != name {
				continue
			}
			h := sha256.New()
			if _, err := io.CopyN(h, io.NewSectionReader(p.Flash, 0, p.Flash.Size()), n); err != nil {
				return nil, err
			}
			m[name] = hex.EncodeToString(h.Sum(nil))
		}
	}
	return m, nil
}

// patience is how long the kernel may take to find disks and network cards, on a
// host that is busy.
const patience = 2 * time.Minute

// eventually calls f until it succeeds.
func eventually(f func() error) error {
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		if err := f(); err == nil || time.Now().After(end) {
			return err
		}
	}
}

// partition returns the path of the partition with that name in the partition table.
func partition(name string) (path string, err error) {
	err = eventually(func() error {
		files, _ := filepath.Glob("/sys/class/block/*/uevent")
		for _, f := range files {
			b, _ := os.ReadFile(f)
			if strings.Contains("\n"+string(b), "\nPARTNAME="+name+"\n") {
				path = "/dev/" + filepath.Base(filepath.Dir(f))
				return nil
			}
		}
		return fmt.Errorf("no partition %s", name)
	})
	return path, err
}

// openPart opens a part of a slot: a file, or else a partition such as "kernel-a".
func openPart(ctx context.Context, l loader, d driver.Driver, part string, id ota.SlotID) (*fileflash.File, error) {
	slot := strings.ToLower(slotNames[id])
	switch {
	case l.entries:
		path, err := d.(*systemdboot.Counting).Path(ctx, id)
		if err != nil {
			return nil, err
		}
		return fileflash.Open(esp+path, nil)
	case l.files != "":
		return fileflash.Open(fmt.Sprintf(l.files, slot)+part, nil)
	}
	return openPartition(part + "-" + slot)
}

func openPartition(name string) (*fileflash.File, error) {
	path, err := partition(name)
	if err != nil {
		return nil, err
	}
	return fileflash.Open(path, nil)
}

func loadModules() error {
	names, err := os.ReadFile("/modules/list")
	if err != nil {
		return err
	}
	for name := range strings.FieldsSeq(string(names)) {
		f, err := os.Open(filepath.Join("/modules", name))
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && err != unix.EEXIST {
			return fmt.Errorf("module %s: %w", name, err)
		}
	}
	return nil
}

// network sets up the first card for QEMU's user network, where the host is
// 10.0.2.2.
func network() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	set := func(request uint, put func(*unix.Ifreq) error) error {
		r, err := unix.NewIfreq("eth0")
		if err == nil {
			err = put(r)
		}
		if err == nil {
			err = unix.IoctlIfreq(s, request, r)
		}
		return err
	}
	addr := func(a, b, c, d byte) func(*unix.Ifreq) error {
		return func(r *unix.Ifreq) error { return r.SetInet4Addr([]byte{a, b, c, d}) }
	}
	if err := eventually(func() error { return set(unix.SIOCSIFADDR, addr(10, 0, 2, 15)) }); err != nil {
		return fmt.Errorf("network: %w", err)
	}
	if err := set(unix.SIOCSIFNETMASK, addr(255, 255, 255, 0)); err != nil {
		return fmt.Errorf("network: %w", err)
	}
	return set(unix.SIOCSIFFLAGS, func(r *unix.Ifreq) error {
		r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
		return nil
	})
}
