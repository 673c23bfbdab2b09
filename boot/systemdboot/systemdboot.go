package systemdboot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/boot/efi"
	"github.com/slotota/ota/internal/fsys"
)

// Variables of the loader (systemd, docs/BOOT_LOADER_INTERFACE.md).
const (
	varDefault   = "LoaderEntryDefault-" + efi.Loader
	varOneShot   = "LoaderEntryOneShot-" + efi.Loader
	varSelected  = "LoaderEntrySelected-" + efi.Loader
	varCountPath = "LoaderBootCountPath-" + efi.Loader
	varFeatures  = "LoaderFeatures-" + efi.Loader
)

// What LoaderFeatures says (systemd, src/fundamental/efivars-fundamental.h).
const (
	featureDefault = 1 << 2
	featureOneShot = 1 << 3
	featureCount   = 1 << 4
	featureSortKey = 1 << 8
)

// Config configures a driver.
type Config struct {
	// Root is where the partition with the entries is mounted; "" means /efi.
	Root string
	// Entries are the names of the slots' entries, without counters and suffix:
	// "acme-a". No name may be the start of another one.
	Entries []string
	// Vars are the variables of the machine; nil means efivarfs where Linux
	// has it.
	Vars efi.Vars
	// Running finds the slot that runs. nil means that LoaderEntrySelected
	// tells.
	Running func(context.Context) (ota.SlotID, error)

	files fsys.FS
}

// common is what both drivers need.
type common struct{ c Config }

func open(c *Config) (common, error) {
	d := common{}
	if c != nil {
		d.c = *c
	}
	if d.c.Root == "" {
		d.c.Root = "/efi"
	}
	if d.c.files == nil {
		d.c.files = fsys.OS{Root: d.c.Root}
	}
	if d.c.Vars == nil {
		d.c.Vars = efi.Efivarfs{}
	}
	d.c.Entries = slices.Clone(d.c.Entries)
	if len(d.c.Entries) < 2 || len(d.c.Entries) > ota.MaxSlots {
		return d, fmt.Errorf("systemdboot: %d slots: %w", len(d.c.Entries), ota.ErrInvalid)
	}
	for i, e := range d.c.Entries {
		other := func(o string) bool { return o != e && strings.HasPrefix(strings.ToLower(o), strings.ToLower(e)) }
		if e == "" || len(e) > 128 || e[0] == '.' || strings.HasPrefix(e, "auto-") || strings.ContainsFunc(e, notName) ||
			slices.Index(d.c.Entries, e) != i || slices.ContainsFunc(d.c.Entries, other) {
			return d, fmt.Errorf("systemdboot: slot %d: entry %s: %w", i, ota.Quote(e), ota.ErrInvalid)
		}
	}
	return d, nil
}

// notName reports whether r cannot be part of the name of an entry, according to the
// Boot Loader Specification, or would be taken for the start of counters.
func notName(r rune) bool {
	return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("_-.", r))
}

// slot returns the slot whose entry has a base name, which FAT may have changed in
// case.
func (d *common) slot(base string) ota.SlotID {
	return ota.SlotID(slices.IndexFunc(d.c.Entries, func(e string) bool { return strings.EqualFold(e, base) }))
}

// Running implements [driver.Driver].
func (d *common) Running(ctx context.Context) (ota.SlotID, error) {
	if d.c.Running != nil {
		return d.c.Running(ctx)
	}
	if err := ctx.Err(); err != nil {
		return ota.NoSlot, err
	}
	for _, name := range []string{varSelected, varCountPath} {
		s, ok, err := d.text(name)
		if err != nil {
			return ota.NoSlot, err
		}
		if !ok {
			continue
		}
		if id := d.slot(ParseName(path.Base(strings.ReplaceAll(s, `\`, "/"))).Base); id != ota.NoSlot {
			return id, nil
		}
		return ota.NoSlot, fmt.Errorf("systemdboot: the loader has started %s: %w", ota.Quote(s), ota.ErrUnknownSlot)
	}
	return ota.NoSlot, fmt.Errorf("systemdboot: the loader does not say what it has started: %w", ota.ErrUnknownSlot)
}

// text returns a variable that holds a string; ok is false if there is none.
func (d *common) text(name string) (s string, ok bool, err error) {
	_, b, err := d.c.Vars.Get(name)
	if errors.Is(err, fs.ErrNotExist) {
		return "", false, nil
	}
	if err != nil {
		return "", false, err
	}
	s = efi.DecodeString(b)
	return s, s != "", nil
}

// require fails if the loader says that it lacks one of the features.
func (d *common) require(features uint64) error {
	_, b, err := d.c.Vars.Get(varFeatures)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it may not have started this system
	}
	if err != nil {
		return err
	}
	var have uint64
	for i := range min(len(b), 8) {
		have |= uint64(b[i]) << (8 * i)
	}
	if have&features != features {
		return fmt.Errorf("systemdboot: the loader has features %#x, and lacks some of %#x: %w", have, features, ota.ErrUnsupported)
	}
	return nil
}

// entries returns all entries in the order of the loader; broken ones, such as an
// image that is being written, come last.
func (d *common) entries(ctx context.Context) ([]*entry, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var es []*entry
	for dir, ext := range map[string]string{type1Dir: type1Ext, type2Dir: type2Ext} {
		names, err := d.c.files.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("systemdboot: %w", err)
		}
		for _, n := range names {
			if n[0] == '.' || strings.HasPrefix(n, "auto-") || !strings.EqualFold(path.Ext(n), ext) {
				continue
			}
			e, err := readEntry(d.c.files, dir, n)
			if err != nil {
				return nil, fmt.Errorf("systemdboot: %w", err)
			}
			e.slot = d.slot(e.name.Base)
			es = append(es, e)
		}
	}
	slices.SortFunc(es, compare)
	return es, nil
}

// validate refuses choices that no loader can carry out. most is how many tries
// there can be.
func (d *common) validate(c driver.Choice, most int) error {
	n := ota.SlotID(len(d.c.Entries))
	if c.Active < 0 || c.Active >= n || c.Revert >= n || c.Trial && (c.Revert < 0 || c.Revert == c.Active) {
		return fmt.Errorf("systemdboot: active slot %d, revert slot %d: %w", c.Active, c.Revert, ota.ErrUnknownSlot)
	}
	if c.Tries < 0 || c.Tries > most || c.Trial && c.Tries == 0 && !c.Booted {
		return fmt.Errorf("systemdboot: %d tries: %w", c.Tries, ota.ErrInvalid)
	}
	return nil
}

// Counting drives systemd-boot by boot counting; it implements [driver.Driver].
type Counting struct{ common }

// New returns a driver that uses boot counting.
func New(c *Config) (*Counting, error) {
	d, err := open(c)
	if err != nil {
		return nil, err
	}
	return &Counting{d}, nil
}

// maxTries is what all versions of the loader can count to: older ones read one
// digit.
const maxTries = 9

// Capabilities implements [driver.Capable].
func (d *Counting) Capabilities() driver.Capabilities {
	return driver.Capabilities{
		Loader: "systemd-boot, boot counting", MaxTries: maxTries,
		OnPanic: driver.IfReset, OnHang: driver.Watchdog, OnUnloadable: driver.IfReset,
		Note: "The loader arms no watchdog. systemd-bless-boot.service must be masked.",
	}
}

// Path returns the file that holds the entry of a slot at the moment, its name below
// the root: that of a unified kernel image is where the firmware itself goes.
func (d *common) Path(ctx context.Context, id ota.SlotID) (string, error) {
	es, err := d.entries(ctx)
	if err != nil {
		return "", err
	}
	for _, e := range es {
		if e.slot == id && id != ota.NoSlot {
			return path.Join(e.dir, e.file), nil
		}
	}
	return "", fmt.Errorf("systemdboot: no entry of slot %d: %w", id, ota.ErrUnknownSlot)
}

// menu is all that decides about the next boots.
type menu struct {
	entries []*entry
	// what chooses by name: once, and always, the variable before the file
	once   string
	always []string
}

func (d *common) menu(ctx context.Context) (m menu, err error) {
	if m.entries, err = d.entries(ctx); err != nil {
		return m, err
	}
	if m.once, _, err = d.text(varOneShot); err != nil {
		return m, err
	}
	name, _, err := d.text(varDefault)
	if err != nil {
		return m, err
	}
	m.always = []string{name}
	b, err := d.c.files.ReadFile("/loader/loader.conf")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return m, fmt.Errorf("systemdboot: %w", err)
	}
	for key, value := range pairs(b, " \t") {
		if key == "default" {
			m.always = []string{name, value}
		}
	}
	if slices.Contains(m.always, saved) {
		return m, fmt.Errorf("systemdboot: the default is %s, which starts a bad entry again: %w", saved, ota.ErrUnsupported)
	}
	return m, nil
}

// saved is the default that stands for what was started last.
const saved = "@saved"

// find returns the first entry that a pattern names, nil if there is none.
func (m menu) find(pattern string) *entry {
	for _, e := range m.entries {
		if e.broken {
			break
		}
		for _, id := range []string{e.id(), strings.ToLower(e.name.String())} {
			if ok, err := path.Match(strings.ToLower(pattern), id); ok && err == nil {
				return e
			}
		}
	}
	return nil
}

// boot returns the entry that is started next, nil if there is none, and the menu
// after counted entries have used up left boots of it.
func (m menu) boot(all bool) (*entry, menu) {
	next := m
	next.once = ""
	e := m.find(m.once)
	for _, name := range m.always {
		if e == nil {
			e = m.find(name)
		}
	}
	if e == nil && len(m.entries) > 0 && !m.entries[0].broken {
		e = m.entries[0]
	}
	if e == nil || !e.name.Counted {
		return e, next
	}
	after := *e
	after.name = after.name.booted()
	if all {
		after.name.Left = 0
	}
	next.entries = slices.Clone(m.entries)
	next.entries[slices.Index(m.entries, e)] = &after
	slices.SortFunc(next.entries, compare)
	return e, next
}

// choice returns what the loader will do.
func (m menu) choice() (c driver.Choice, err error) {
	c = driver.Choice{Active: ota.NoSlot, Revert: ota.NoSlot}
	if !slices.ContainsFunc(m.entries, func(e *entry) bool { return e.slot != ota.NoSlot && !e.broken }) {
		return c, fmt.Errorf("systemdboot: there is no entry of a slot: %w", ota.ErrNoBootState)
	}
	if once := m.find(m.once); once != nil && once.slot != ota.NoSlot {
		_, next := m.boot(false)
		if e, _ := next.boot(false); e.slot != once.slot {
			return driver.Choice{Active: once.slot, Trial: true, Revert: e.slot, Tries: 1}, nil
		}
	}
	m.once = ""
	e, next := m.boot(true)
	if e.slot == ota.NoSlot {
		return c, fmt.Errorf("systemdboot: the loader prefers %s: %w", ota.Quote(e.file), ota.ErrBadBootState)
	}
	c.Active = e.slot
	if !e.name.Counted {
		return c, nil
	}
	last, next := next.boot(true)
	if last.slot == e.slot {
		// It is started whatever its counters say, for lack of another one.
		c.Worn = true
		return c, nil
	}
	if again, _ := next.boot(false); again.slot != last.slot {
		// A trial follows the trial, and nothing is to go back to.
		return driver.Choice{Active: e.slot, Trial: true, Revert: ota.NoSlot, Tries: e.name.Left, Booted: e.name.Done > 0}, nil
	}
	return driver.Choice{Active: e.slot, Trial: true, Revert: last.slot, Tries: e.name.Left, Booted: e.name.Done > 0}, nil
}

// Read implements [driver.Driver].
func (d *Counting) Read(ctx context.Context) (driver.Choice, error) {
	m, err := d.menu(ctx)
	if err != nil {
		return driver.Choice{Active: ota.NoSlot, Revert: ota.NoSlot}, err
	}
	return m.choice()
}

// Write implements [driver.Driver]. Every rename leaves the loader with the old choice
// or the new one. One trial in the place of another calls that one off first.
func (d *Counting) Write(ctx context.Context, c driver.Choice) error {
	if err := d.validate(c, maxTries); err != nil {
		return err
	}
	if err := d.require(featureCount | featureSortKey); err != nil {
		return err
	}
	m, err := d.menu(ctx)
	if err != nil {
		return err
	}
	for _, id := range []ota.SlotID{c.Active, c.Revert} {
		if id != ota.NoSlot && (c.Trial || id == c.Active) && !slices.ContainsFunc(m.entries, func(e *entry) bool { return e.slot == id && !e.broken }) {
			return fmt.Errorf("systemdboot: there is no sound entry %s for slot %d: %w", ota.Quote(d.c.Entries[id]), id, ota.ErrInvalid)
		}
	}
	want := c
	if !c.Trial || c.Tries == 0 {
		want = driver.Choice{Active: c.Active, Revert: ota.NoSlot}
		if c.Trial {
			want.Active = c.Revert
		}
	}
	old, err := m.choice()
	if err != nil && !errors.Is(err, ota.ErrNoBootState) && !errors.Is(err, ota.ErrBadBootState) {
		return err
	}
	for _, hide := range []bool{false, true} {
		changes := m.changes(c, hide)
		budget := 1000
		order, got := m.order(changes, &budget, func(s driver.Choice) bool { return does(s, want) || does(s, old) })
		if order == nil || !does(got, want) {
			continue
		}
		return d.rename(ctx, order, want)
	}
	if old.Trial && old.Revert != ota.NoSlot && c.Trial && old.Active != c.Active {
		// The old trial has to be called off first.
		if err := d.Write(ctx, driver.Choice{Active: old.Revert, Revert: ota.NoSlot}); err != nil {
			return err
		}
		return d.Write(ctx, c)
	}
	return fmt.Errorf("systemdboot: no names make the loader choose slot %d, trial %v: the order of entries or a default stands against it: %w", c.Active, c.Trial, ota.ErrUnsupported)
}

// does reports whether s and want make the loader do the same.
func does(s, want driver.Choice) bool {
	return s.Active == want.Active && s.Trial == want.Trial && s.Revert == want.Revert && s.Tries == want.Tries && s.Booted == want.Booted
}

// change is a rename: to another name of the same entry, or out of the loader's
// sight.
type change struct {
	e  *entry
	to string
}

// changes returns the renames that choice c needs. hide makes the revert slot of a
// trial bad, so that it is sorted behind the trial until that is bad as well.
func (m menu) changes(c driver.Choice, hide bool) (cs []change) {
	var seen []ota.SlotID
	for _, e := range m.entries {
		if e.slot == ota.NoSlot {
			continue
		}
		n := e.name
		switch {
		case slices.Contains(seen, e.slot):
			// A rename on FAT that was cut off can leave both names. Neither
			// may be removed, for both have the same clusters.
			cs = append(cs, change{e, e.file + ".old"})
			continue
		case e.slot == c.Active && c.Trial:
			n.Counted, n.Left, n.Done = true, c.Tries, 0
			if c.Booted {
				n.Done = max(e.name.Done, 1)
			}
		case e.slot == c.Active, e.slot == c.Revert && c.Trial && !hide:
			n.Counted, n.Left, n.Done = false, 0, 0
		default:
			n.Counted, n.Left = true, 0
		}
		seen = append(seen, e.slot)
		if n != e.name {
			cs = append(cs, change{e, n.String()})
		}
	}
	return cs
}

// with returns the menu after a rename.
func (m menu) with(c change) menu {
	m.entries = slices.Clone(m.entries)
	i := slices.IndexFunc(m.entries, func(e *entry) bool { return e.dir == c.e.dir && e.file == c.e.file })
	if n := ParseName(c.to); n.Ext == c.e.name.Ext {
		e := *c.e
		e.name, e.file = n, c.to
		m.entries[i] = &e
	} else {
		m.entries = slices.Delete(m.entries, i, i+1)
	}
	slices.SortFunc(m.entries, compare)
	return m
}

// order sorts renames so that ok holds after each, and returns them with what the
// loader does in the end; nil if there is no such order. budget bounds
// the search.
func (m menu) order(cs []change, budget *int, ok func(driver.Choice) bool) ([]change, driver.Choice) {
	if len(cs) == 0 {
		c, _ := m.choice()
		return []change{}, c
	}
	for i, c := range cs {
		if *budget--; *budget < 0 {
			break
		}
		next := m.with(c)
		if s, err := next.choice(); err != nil || !ok(s) {
			continue
		}
		rest, s := next.order(slices.Delete(slices.Clone(cs), i, i+1), budget, ok)
		if rest != nil {
			return append([]change{c}, rest...), s
		}
	}
	return nil, driver.Choice{}
}

func (d *Counting) rename(ctx context.Context, order []change, want driver.Choice) error {
	for _, c := range order {
		if err := fsys.Move(d.c.files, path.Join(c.e.dir, c.e.file), path.Join(c.e.dir, c.to)); err != nil {
			return fmt.Errorf("systemdboot: %w", err)
		}
	}
	m, err := d.menu(context.WithoutCancel(ctx))
	if err != nil {
		return err
	}
	got, err := m.choice()
	if err == nil && !does(got, want) {
		err = ota.ErrVerify
	}
	if err != nil {
		return fmt.Errorf("systemdboot: reading the entries back: %w", err)
	}
	return nil
}
