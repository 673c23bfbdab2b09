package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/boot/detect"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/boot/health"
	"github.com/slotota/ota/boottest"
	"github.com/slotota/ota/flash/fileflash"
	"github.com/slotota/ota/flashtest"
)

func selftest(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	var flashes, copies list
	fs.Var(&flashes, "flash", "`file` or block device to be tested as flash")
	fs.Var(&copies, "record", "`file` of a copy of the boot record, which must not exist; give all copies")
	overwrite := fs.Bool("overwrite", false, "agree that what -flash names loses its content")
	report := fs.Bool("health", false, "report what would stop a rollback on this machine (Linux)")
	root := fs.String("root", "/", "with -health: `directory` that proc and sys are in")
	return func(ctx context.Context, e *env, args []string) error {
		switch {
		case len(args) > 0:
			return want(args, 0, 0)
		case len(flashes)+len(copies) == 0 && !*report:
			return usagef("need -flash, -record or -health")
		case len(flashes) > 0 && !*overwrite:
			return fail(exitUsage, "add -overwrite if that is what you want", "the content of %s would be lost", flashes[0])
		}
		var errs []error
		check := func(what string, run func() error) {
			err := run()
			if err != nil {
				e.printf("%s: %s\n", what, e.paint(31, "failed"))
				errs = append(errs, fmt.Errorf("%s: %w", what, err))
				return
			}
			e.printf("%s: %s\n", what, e.paint(32, "ok"))
		}
		if *report {
			o := health.Options{Root: *root}
			if r := detect.Run(*root); len(r.Loaders) > 0 {
				o.Capabilities = driver.Capabilities{Loader: r.Loaders[0].Name, Copies: r.Loaders[0].Copies}
			}
			found := health.Check(ctx, &o)
			e.printFindings(found)
			check("health", func() error {
				if health.Worst(found) == ota.Critical {
					return errors.New("a firmware that does not work may never be rolled back")
				}
				return nil
			})
		}
		for _, name := range flashes {
			check("flash "+plain(name), func() error {
				f, err := fileflash.Open(name, nil)
				if err != nil {
					return err
				}
				return errors.Join(flashtest.Test(f), f.Close())
			})
		}
		if len(copies) > 0 {
			check("boot record", func() error { return checkRecord(ctx, copies) })
		}
		return errors.Join(errs...)
	}
}

// printFindings prints what would stop a rollback.
func (e *env) printFindings(fs []ota.Finding) {
	colours := map[ota.Severity]int{ota.Critical: 31, ota.Warning: 33, ota.Note: 36}
	for _, f := range fs {
		colour, known := colours[f.Severity]
		if !known {
			colour = 36
		}
		e.printf("%s %s: %s\n", e.paint(colour, plain(string(f.Severity))), plain(f.ID), plain(f.What))
		if f.Remedy != "" {
			e.printf("  remedy: %s\n", plain(f.Remedy))
		}
	}
}

// checkRecord checks a boot record in files that do not exist yet, and removes
// them.
func checkRecord(ctx context.Context, copies []string) error {
	for _, name := range copies {
		if _, err := os.Lstat(name); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%s exists, or cannot be looked for; a test needs files of its own", name)
		}
	}
	defer func() {
		for _, name := range copies {
			os.Remove(name)
		}
	}()
	return boottest.Check(ctx, func() (ota.Bootloader, error) {
		return bootrecord.Files(copies, &bootrecord.Options{
			Running: func(context.Context) (ota.SlotID, error) { return 0, nil },
		})
	})
}
