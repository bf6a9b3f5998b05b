"""What commands found, as people see it: tables, trees and maps on a terminal, plots and pages in a browser."""
