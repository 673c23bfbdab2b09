package grub

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/internal/filelock"
	"github.com/slotota/ota/internal/fsys"
)

// Variables of Mender's scheme.
const (
	varPart    = "mender_boot_part"
	varUpgrade = "upgrade_available"
	varCount   = "bootcount"
	varEditing = "editing" // in the lock files
)

// menderLock is what grub-mender-grubenv-set locks.
const menderLock = "/var/lock/grub-mender-grubenv-set.lock"

// MenderConfig configures a [Mender].
type MenderConfig struct {
	// Dir holds the directories mender_grubenv1 and mender_grubenv2. "" means the
	// ENV_DIR of /etc/mender_grubenv.config or else the first of the places
	// where Mender's tools look.
	Dir string
	// Parts are the numbers of the two partitions: mender_rootfsa_part and
	// mender_rootfsb_part in GRUB's configuration.
	Parts [2]string
	// Roots are what the kernel parameter root is for either slot, such as
	// "/dev/mmcblk0p2" or "PARTUUID=…".
	Roots [2]string
	// Running finds the slot that runs. nil means that Roots tells.
	Running func(context.Context) (ota.SlotID, error)
	// LockFile is locked while the environment is in use; "" means
	// /var/lock/grub-mender-grubenv-set.lock, as Mender's tools.
	LockFile string

	files fsys.FS
}

// Mender drives GRUB with Mender's scripts; it implements [driver.Driver]. The
// environment is kept twice, in mender_grubenv1 and mender_grubenv2 (Mender,
// mendersoftware/grub-mender-grubenv, grub-mender-grubenv-print and
// 04_mender_setup_env_grub_functions.cfg):
//
//	env               the variables mender_boot_part, upgrade_available, bootcount
//	lock              editing=1 while env is written, else editing=0
//	lock.sha256sum    the digest of lock with editing=0
//
// A copy whose lock does not say editing=0 is not looked at; the scripts make it
// anew from the other one. Copy 2 is written first. Files are overwritten in place,
// one after the other, each synced: on FAT there is nothing safer.
//
// GRUB starts a trial once: it sets bootcount to 1, and when it finds that, goes
// to the other partition. An unloadable kernel on trial makes it restart; for
// panics and hangs see the package's documentation.
type Mender struct {
	c MenderConfig
}

// NewMender returns a driver. Errors wrap [ota.ErrInvalid], or [ota.ErrNoBootState]
// if there is no environment.
func NewMender(c *MenderConfig) (*Mender, error) {
	d := &Mender{}
	if c != nil {
		d.c = *c
	}
	for _, p := range d.c.Parts {
		if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 || strconv.FormatUint(n, 10) != p {
			return nil, fmt.Errorf("grub: partition %s: %w", ota.Quote(p), ota.ErrInvalid)
		}
	}
	roots := d.c.Roots
	switch {
	case d.c.Parts[0] == d.c.Parts[1]:
		return nil, fmt.Errorf("grub: partition %s twice: %w", d.c.Parts[0], ota.ErrInvalid)
	case d.c.Running != nil:
	case roots[0] == "" || roots[1] == "" || roots[0] == roots[1]:
		return nil, fmt.Errorf("grub: nothing tells which slot runs: %w", ota.ErrInvalid)
	default:
		d.c.Running = driver.RunningFromCmdline("", "root", roots[:])
	}
	if d.c.files == nil {
		d.c.files = fsys.OS{}
	}
	if d.c.LockFile == "" {
		d.c.LockFile = menderLock
	}
	if d.c.Dir == "" {
		var err error
		if d.c.Dir, err = menderDir(d.c.files); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// menderDir finds the environment as Mender's tools do.
func menderDir(files fsys.FS) (dir string, err error) {
	b, err := files.ReadFile("/etc/mender_grubenv.config")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("grub: %w", err)
	}
	for l := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(l, "="); ok && strings.TrimRight(name, " ") == "ENV_DIR" {
			dir = strings.TrimSpace(value)
		}
	}
	if dir != "" {
		return dir, nil
	}
	for _, dir := range []string{"/boot/efi/grub-mender-grubenv", "/boot/grub/grub-mender-grubenv", "/boot/efi/EFI/BOOT", "/boot/grub"} {
		if _, err := files.ReadFile(dir + "/mender_grubenv1/env"); err == nil {
			return dir, nil
		}
	}
	return "", fmt.Errorf("grub: no directory mender_grubenv1 found: %w", ota.ErrNoBootState)
}

// Capabilities implements [driver.Capable].
func (d *Mender) Capabilities() driver.Capabilities {
	return driver.Capabilities{
		Loader: "GRUB (Mender)", MaxTries: 1, Copies: 2,
		OnPanic: driver.IfReset, OnHang: driver.No, OnUnloadable: driver.Yes,
	}
}

// Running implements [driver.Driver].
func (d *Mender) Running(ctx context.Context) (ota.SlotID, error) { return d.c.Running(ctx) }

// copies are the two copies of the environment.
type copies struct {
	raw  [2][]byte
	env  [2]*Block // nil if it cannot be read as one
	good [2]bool   // the lock says editing=0
	lock [2]*Block // nil likewise
	sum  []byte    // what sha256sum said about a good lock, nil if nobody knows
}

func (d *Mender) path(k int, name string) string {
	return path.Join(d.c.Dir, "mender_grubenv"+strconv.Itoa(k+1), name)
}

// file returns the content of a file, nil if there is none.
func (d *Mender) file(k int, name string) ([]byte, error) {
	b, err := d.c.files.ReadFile(d.path(k, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("grub: %w", err)
	}
	return b, nil
}

func (d *Mender) load() (v copies, err error) {
	for k := range v.env {
		if v.raw[k], err = d.file(k, "env"); err != nil {
			return v, err
		}
		lock, err := d.file(k, "lock")
		if err != nil {
			return v, err
		}
		if e, err := ParseBlock(v.raw[k]); err == nil {
			v.env[k] = e
		}
		if l, err := ParseBlock(lock); err == nil {
			editing, _ := l.Get(varEditing)
			v.lock[k], v.good[k] = l, editing == "0"
		}
		if v.sum == nil {
			if v.sum, err = d.file(k, "lock.sha256sum"); err != nil {
				return v, err
			}
		}
	}
	if v.raw[0] == nil && v.raw[1] == nil {
		return v, fmt.Errorf("grub: no environment in %s: %w", ota.Quote(d.c.Dir), ota.ErrNoBootState)
	}
	return v, nil
}

// counts returns the copy that GRUB acts on.
func (v *copies) counts() int {
	if v.good[1] && !v.good[0] {
		return 1
	}
	return 0
}

// worn reports whether a copy has to be made anew.
func (v *copies) worn() bool {
	return !v.good[0] || !v.good[1] || !bytes.Equal(v.raw[0], v.raw[1])
}

// lockOS waits for other programs, and returns a function that lets them go on.
func (d *Mender) lockOS(ctx context.Context) (func(), error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if _, ok := d.c.files.(fsys.OS); !ok {
		return func() {}, nil // nobody else is there
	}
	unlock, err := filelock.Lock(ctx, []string{d.c.LockFile})
	if err != nil {
		return nil, fmt.Errorf("grub: %w", err)
	}
	return unlock, nil
}

// Read implements [driver.Driver].
func (d *Mender) Read(ctx context.Context) (driver.Choice, error) {
	unlock, err := d.lockOS(ctx)
	if err != nil {
		return driver.Choice{}, err
	}
	defer unlock()
	v, err := d.load()
	if err != nil {
		return driver.Choice{}, err
	}
	return d.choice(&v)
}

func (d *Mender) choice(v *copies) (driver.Choice, error) {
	c := driver.Choice{Active: ota.NoSlot, Revert: ota.NoSlot}
	e := v.env[v.counts()]
	if e == nil {
		return c, fmt.Errorf("grub: %s: %w: %w", ota.Quote(d.path(v.counts(), "env")), ErrFormat, ota.ErrBadBootState)
	}
	part, _ := e.Get(varPart)
	up, _ := e.Get(varUpgrade)
	count, _ := e.Get(varCount)
	flag := []string{"0", "1"}
	c.Active = ota.SlotID(slices.Index(d.c.Parts[:], part))
	if c.Active < 0 || !slices.Contains(flag, up) || !slices.Contains(flag, count) {
		c.Active = ota.NoSlot
		return c, fmt.Errorf("grub: %s=%s %s=%s %s=%s: %w", varPart, ota.Quote(part), varUpgrade, ota.Quote(up), varCount, ota.Quote(count), ota.ErrBadBootState)
	}
	switch {
	case up == "0":
		c.Worn = v.worn()
	case count == "0":
		c.Trial, c.Revert, c.Tries = true, 1-c.Active, 1
	default:
		c.Trial, c.Revert, c.Booted = true, 1-c.Active, true
	}
	return c, nil
}

// Write implements [driver.Driver].
func (d *Mender) Write(ctx context.Context, c driver.Choice) error {
	if c.Active < 0 || c.Active > 1 || c.Trial && c.Revert != 1-c.Active {
		return fmt.Errorf("grub: active slot %d, revert slot %d: %w", c.Active, c.Revert, ota.ErrUnknownSlot)
	}
	if c.Tries < 0 || c.Tries > 1 {
		return fmt.Errorf("grub: %d tries: %w", c.Tries, ota.ErrInvalid)
	}
	unlock, err := d.lockOS(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	v, err := d.load()
	if err != nil {
		return err
	}
	base := v.counts()
	if v.env[base] == nil && v.good[1-base] {
		base = 1 - base
	}
	if v.env[base] == nil {
		return fmt.Errorf("grub: no copy of the environment can be read: %w", ota.ErrBadBootState)
	}
	upgrade, count := "0", "0"
	if c.Trial {
		upgrade = "1"
		if c.Booted || c.Tries == 0 {
			count = "1"
		}
	}
	e := &Block{lines: slices.Clone(v.env[base].lines), size: v.env[base].size}
	for _, s := range [][2]string{{varPart, d.c.Parts[c.Active]}, {varUpgrade, upgrade}, {varCount, count}} {
		if err := e.Set(s[0], s[1]); err != nil {
			return err
		}
	}
	raw, err := e.Bytes()
	if err != nil {
		return err
	}
	if bytes.Equal(raw, v.raw[0]) && !v.worn() {
		return nil
	}
	if err := d.store(&v, raw); err != nil {
		return err
	}
	got, err := d.load()
	if err == nil && (!bytes.Equal(got.raw[0], raw) || !bytes.Equal(got.raw[1], raw) || !got.good[0] || !got.good[1]) {
		err = fmt.Errorf("grub: the environment reads differently from what was written: %w", ota.ErrVerify)
	}
	return err
}

// store writes raw into both copies. At no time is the copy that counts neither
// complete nor locked.
func (d *Mender) store(v *copies, raw []byte) error {
	locks, err := v.locks()
	if err != nil {
		return err
	}
	put := func(k int, env []byte) error {
		for _, f := range []struct {
			name string
			b    []byte
		}{{"lock", locks[1]}, {"env", env}, {"lock", locks[0]}} {
			if err := d.put(d.path(k, f.name), f.b); err != nil {
				return fmt.Errorf("grub: %w", err)
			}
		}
		return nil
	}
	if v.counts() == 1 {
		// Before copy 2 is locked copy 1 must be sound.
		if err := put(0, v.raw[1]); err != nil {
			return err
		}
	}
	if err := put(1, raw); err != nil {
		return err
	}
	return put(0, raw)
}

// locks returns what a lock file holds for editing=0 and editing=1. The first fits
// the digest, if there is one and that can be done.
func (v *copies) locks() (locks [2][]byte, err error) {
	noted := &Block{lines: []line{{"", strings.TrimSuffix(warning, "\n")}}, size: BlockSize}
	for _, l := range []*Block{v.lock[0], v.lock[1], NewBlock(), noted} {
		if l == nil {
			continue
		}
		var both [2][]byte
		for i := range both {
			if err := l.Set(varEditing, strconv.Itoa(i)); err != nil {
				return locks, err
			}
			if both[i], err = l.Bytes(); err != nil {
				return locks, err
			}
		}
		digest := sha256.Sum256(both[0])
		fits := bytes.HasPrefix(v.sum, []byte(hex.EncodeToString(digest[:])))
		if locks[0] == nil || fits {
			locks = both
		}
		if fits || v.sum == nil {
			break
		}
	}
	return locks, nil
}

// put makes a file hold b, in place if there is one of that length.
func (d *Mender) put(name string, b []byte) error {
	old, err := d.c.files.ReadFile(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err == nil && len(old) == len(b) {
		return d.c.files.Overwrite(name, b)
	}
	return fsys.Replace(d.c.files, name, b)
}
